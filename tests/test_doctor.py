"""The doctor: what it says of a sound installation and a sound recipe, and one line for each thing that is wrong."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import sys
import tomllib
import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from train_t2i.__main__ import main
from train_t2i.config import Config
from train_t2i.doctor import examination, installation, machine
from train_t2i.doctor.findings import Finding, looked
from train_t2i.errors import EXIT_DONE, EXIT_USER, UserError

USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture
def manifest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A manifest's folder with nothing in it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "manifest.toml").write_text("")
    monkeypatch.setattr(examination, "FOLDER", folder)
    monkeypatch.setattr(examination, "MANIFEST", folder / "manifest.toml")
    return folder


def problems(out: str) -> list[str]:
    return [line.removeprefix("problem: ") for line in out.splitlines() if line.startswith("problem: ")]


def said(found: list[Finding], subject: str) -> str:
    return next(finding.said for finding in found if finding.subject == subject)


# -- the installation ------------------------------------------------------------------------------------------------


def test_packages_that_are_missing_or_too_old(monkeypatch):
    wanted = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [line for line in installation.versions() if line.way_out] == []
    assert len(installation.requirements()[1]) == len(wanted)
    true = installation.version_of
    monkeypatch.setattr(installation, "version_of", lambda name: {"peft": None, "torch": "2.9.1"}.get(name, true(name)))
    found = [(line.subject, line.said) for line in installation.versions() if line.way_out]
    assert sorted(found) == [("peft", "is not installed (needs >=0.19)"), ("torch", "2.9.1 is not >=2.10")]


def test_without_the_package_that_reads_flags_it_says_so(monkeypatch, capsys):
    """A program as it is started, on an installation that lacks yaml."""
    for name in [name for name in sys.modules if name.startswith(("train_t2i", "yaml"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.setattr(sys, "argv", ["train_t2i", "doctor", "--model", "sdxl"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("train_t2i", run_name="__main__")
    assert ended.value.code == EXIT_USER
    assert [line.split(" (")[0] for line in problems(capsys.readouterr().out)] == ["toolkit: cannot be imported"]


@pytest.mark.parametrize("torn", installation.PROGRAMS)
def test_a_library_that_is_torn(torn, manifest, monkeypatch, capsys):
    true = installation.import_module

    def tears(name: str) -> object:
        if name == torn:
            raise OSError("libcudart.so.13: cannot open shared object file")
        return true(name)

    monkeypatch.setattr(installation, "import_module", tears)
    assert main(["doctor", "--model", "sdxl"]) == EXIT_USER
    out = capsys.readouterr().out
    assert problems(out) == [
        f"{torn}: cannot be imported (OSError: libcudart.so.13: cannot open shared object file) ({installation.ANEW})"
    ]
    assert "not looked at" in out
    assert ("devices " in out) == (torn != "torch")


def test_a_look_that_fails_is_a_problem_and_keeps_what_it_found():
    def fails(error: Exception):
        yield Finding("a", "found")
        raise error

    assert list(looked("b", lambda: fails(UserError("no", "do this")))) == [
        Finding("a", "found"), Finding("b", "no", "do this"),
    ]  # fmt: skip
    (_, unknown) = looked("b", lambda: fails(RuntimeError("deep\ninside")))
    assert unknown.said == "cannot be looked at (RuntimeError: deep)"
    assert unknown.way_out


# -- the machine -----------------------------------------------------------------------------------------------------


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_driver_that_is_too_old_or_does_not_answer(tmp_path, monkeypatch):
    import torch

    def too_old() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).", stacklevel=2
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "absent")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert [line for line in machine.gpus() if line.way_out] == []  # no driver, no GPU: no problem
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    nvidia_smi(tmp_path, monkeypatch, "echo 470.57.02")
    (found,) = [line for line in machine.gpus() if line.way_out]
    assert found.said.startswith("470.57.02: torch cannot use the GPU here: CUDA initialization: The NVIDIA driver on")
    nvidia_smi(tmp_path, monkeypatch, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    (found,) = [line for line in machine.gpus() if line.way_out]
    assert found.said == "Failed to initialize NVML: Driver/library version mismatch"


def test_gpus_and_what_torch_warns_of(monkeypatch):
    import torch

    about = namedtuple("about", "name total_memory")
    monkeypatch.setattr(machine, "driver", lambda: machine.Driver("610.1"))
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 2, "mem_get_info": lambda i: (5 * 10**9, 0),
        "init": lambda: warnings.warn("sm_50 is not compatible", stacklevel=2), "get_device_properties": lambda i: about("A", 8 * 10**9),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    found = list(machine.gpus())
    assert "2 GPUs for torch" in said(found, "devices")
    assert "driver 610.1" in said(found, "devices")
    assert said(found, "GPU 1") == "A, 8.0 GB, 5.0 GB free"
    assert [line.said for line in found if line.way_out] == ["sm_50 is not compatible"]
    assert machine.gpu_free_bytes() == [5 * 10**9] * 2


def test_memory_is_what_the_container_may_use(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 4000000 kB\nMemAvailable:    3000000 kB\n")
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "LIMIT", tmp_path / "memory.max")
    assert machine.memory_bytes()[1] == 3000000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_bytes()[1] == 3000000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert machine.memory_bytes() == (1000000, 1000000)


def test_disks(tmp_path, monkeypatch):
    (fine,) = machine.disk("runs", tmp_path / "a" / "b")
    assert not fine.way_out
    assert list(tmp_path.iterdir()) == []  # nothing is made
    (tmp_path / "file").touch()
    (found,) = machine.disk("runs", tmp_path / "file" / "b")
    assert "cannot be written (Not a directory)" in found.said
    (found,) = machine.disk("runs", Path("/proc/run"))
    assert "cannot be written" in found.said
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: USAGE(10, 9, 5 * 10**8))
    _, problem = machine.disk("runs", tmp_path)
    assert problem.said == f"{tmp_path}: 0.5 GB free, and a few files takes 1.0 GB"


# -- weights ---------------------------------------------------------------------------------------------------------


def test_weights_of_the_manifest(manifest, sdxl_folder, capsys):
    from train_t2i.fetch import sha256_of

    shutil.copytree(sdxl_folder, manifest / "whole")
    shutil.copytree(sdxl_folder, manifest / "torn")
    shutil.copytree(sdxl_folder, manifest / "flipped")
    shutil.copytree(sdxl_folder, manifest / "shards")
    (manifest / "prompts.txt").write_text("a\n")
    (manifest / "page.pt").write_text("<html>")
    vae = Path("vae", "diffusion_pytorch_model.safetensors")
    digest = sha256_of(sdxl_folder / vae)
    lines = ["[absent]\nrepository = 'a/b'", "[data]\nrepository = 'a/b'\nlocal_name = 'prompts.txt'"]
    lines += ["[tower]\nrepository = 'a/b'\nfile = 'x/page.pt'", "[shards]\nrepository = 'a/b'"]
    lines += [f"[{name}]\nwhat = 'x'\n[{name}.sha256]\n'{vae}' = '{digest}'" for name in ("whole", "torn", "flipped")]
    (manifest / "manifest.toml").write_text("\n".join(lines))
    os.truncate(manifest / "torn" / vae, (manifest / "torn" / vae).stat().st_size - 8)
    with open(manifest / "flipped" / vae, "r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x55")
    index = manifest / "shards" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    out = manifest / "found.json"
    assert main(["doctor", "--out", str(out)]) == EXIT_USER
    found = problems(capsys.readouterr().out)
    expected = {
        "torn": "is truncated or damaged", "flipped": "its sha256 is ", "shards": "gone.safetensors: is missing, 1 of 1",
        "tower": "page.pt: is a web page, not weights",
    }  # fmt: skip
    assert len(found) == len(expected)
    for line in found:
        assert expected[line.split(": ")[0]] in line
    told = json.loads(out.read_text())
    assert told["problems"] == 4
    facts = {line["subject"]: line["said"] for line in told["findings"] if not line["problem"]}
    assert facts["whole"].endswith("1 sha256 as in the manifest")
    assert "prompts.txt: 1 file, 2 B" in facts["data"]
    assert facts["not fetched"].startswith("absent ")
    assert digest not in str(facts)
    for name in ("torn", "flipped", "shards"):
        shutil.rmtree(manifest / name)
    (manifest / "page.pt").unlink()
    assert main(["doctor", "--digests"]) == EXIT_DONE
    assert f"sha256 {digest}  {vae}" in capsys.readouterr().out


# -- a recipe --------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(manifest: Path, sdxl_folder: Path, prompts_file: Path, towers: dict[str, Path], tmp_path: Path) -> str:
    return (
        f"--pretrained-model {sdxl_folder} --data-path-train {prompts_file} --output-dir {tmp_path} --exp-name new "
        f"--resolution 32 --mixed-precision no --lora-rank 2 --batch-size 2 --clip-reward-model {towers['clip']}"
    )


def test_a_sound_recipe(recipe, tmp_path, prompts_file, capsys):
    """Also as a launcher's row: the file that --dry-run prints."""
    assert main(shlex.split(f"train {recipe} --dry-run")) == EXIT_DONE
    (tmp_path / "row.yaml").write_text(capsys.readouterr().out)
    assert main(["doctor", "--config", str(tmp_path / "row.yaml")]) == EXIT_DONE
    out = capsys.readouterr().out
    assert problems(out) == []
    rows = len(prompts_file.read_text().splitlines())
    for part in (
        f"{prompts_file}: {rows} rows",
        "on each device, ",
        "reward clip",
        "--pretrained-model",
        "dmdr, 32 px",
    ):
        assert part in out
    assert out.endswith("no problem was found\n")
    assert not (tmp_path / "new").exists()


def test_all_that_is_wrong_with_a_recipe_is_told_at_once(recipe, tmp_path, sdxl_folder, towers, monkeypatch, capsys):
    from train_t2i.doctor import recipe as looks

    broken = tmp_path / "broken"
    shutil.copytree(sdxl_folder, broken)
    os.truncate(broken / "vae" / "diffusion_pytorch_model.safetensors", 100)
    (tmp_path / "new" / "checkpoints" / "torch_units").mkdir(parents=True)
    (tmp_path / "new" / "checkpoints" / "torch_units" / "step-3.pt").touch()
    monkeypatch.setattr(looks, "version_of", lambda name: None)
    monkeypatch.setattr(machine, "gpu_free_bytes", lambda: [10**8])
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: USAGE(10, 9, 5 * 10**8))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    faults = f"--pretrained-model {broken} --data-path-train absent.txt --hpsv2-reward-model absent.pt "
    faults += (
        "--generator-init absent.safetensors --tiny-vae no/such-vae --backend zero2 --use-8bit-adam --num-processes 2"
    )
    assert main(shlex.split(f"doctor {recipe} {faults}")) == EXIT_USER
    found = problems(capsys.readouterr().out)
    expected = [
        "deepspeed: is not installed", "bitsandbytes: is not installed", "--pretrained-model: ", "--tiny-vae: no/such-vae",
        "--generator-init: absent.safetensors", "reward hps: absent.pt", "data: cannot read absent.txt", "devices: 2 processes, and 1 GPUs",
        "devices: needs ", "run folder: ", "run folder: ",
    ]  # fmt: skip
    assert len(found) == len(expected), found
    for line, beginning in zip(found, expected):
        assert line.startswith(beginning), line
        assert line.endswith(")")
    assert "already holds a run" in found[-1]
    assert "a checkpoint takes" in found[-2]


def test_a_run_is_held_against_what_the_machine_has(monkeypatch):
    from train_t2i.doctor.recipe import fits
    from train_t2i.plan.estimate import Plan

    gb = 10**9
    plan = Plan(2 * gb, gb, gb, 0, 0, 0, 0, {"rollout": (0, gb)}, 2 * gb)
    assert plan.total == 7 * gb

    def found(world: int, gpus: list[int], available: int) -> list[str]:
        monkeypatch.setattr(machine, "gpu_free_bytes", lambda: gpus)
        monkeypatch.setattr(machine, "memory_bytes", lambda: (100 * gb, available))
        return [line.said for line in fits(Config(), world, plan)]

    assert found(2, [7 * gb, 8 * gb], 0) == []
    assert found(2, [7 * gb, 6 * gb], 0) == ["needs 7.0 GB on each GPU, and 6.0 GB are free on one of them"]
    assert found(2, [7 * gb], 0) == ["2 processes, and 1 GPUs here"]
    plan = replace(plan, host={"optimizer": 2 * gb, "activations": gb})
    assert found(2, [7 * gb, 8 * gb], 6 * gb) == []
    assert found(2, [7 * gb, 8 * gb], 5 * gb) == [
        "optimizer and activations that wait on the host take 6.0 GB, and 5.0 GB are available"
    ]
    plan = replace(plan, host={})
    assert found(2, [], 10 * gb) == []  # without the reserve of a GPU
    assert found(2, [], 9 * gb) == ["needs 7.0 GB on each device; no GPU is here, and 9.0 GB of memory"]


def test_a_model_whose_sizes_nobody_knows_is_no_problem(recipe, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert main(shlex.split(f"doctor {recipe} --pretrained-model someone/unknown")) == EXIT_DONE
    out = capsys.readouterr().out
    assert "someone/unknown: is not here; it is downloaded from the hub at the first start" in out
    assert "what it needs is not known: " in out


def test_a_wrong_flag_is_told_as_everywhere(capsys):
    assert main(["doctor", "--batch-siz", "3"]) == EXIT_USER
    assert capsys.readouterr().err.startswith("error: --batch-siz: unknown flag")
    assert main(["doctor", "--out", "/proc/found.json", "--num-processes", "0"]) == EXIT_USER
    assert "--num-processes 0: must be at least 1" in capsys.readouterr().err
