"""Launchers: every one parses in both columns, from any directory, and is overridden by environment and arguments."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from test_entries import PUBLISHED

from train_t2i import cli
from train_t2i.entries import translate

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = sorted((ROOT / "scripts" / "single_node").glob("*.sh"))
MULTI_NODE = sorted(
    path for path in (ROOT / "scripts" / "multi_node").glob("*.sh") if path.stem not in ("multi", "slurm")
)


def launched(
    command: list[str], cwd: Path, *, data: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A launcher whose PYTHON is a program that prints its arguments, and torch's patience on stderr."""
    echo = cwd / "echo_arguments"
    echo.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\necho "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-}" >&2\n')
    echo.chmod(0o755)
    tiny = ("prompts.txt", "pairs/metadata.csv", "images/metadata.csv", "edits/metadata.json")
    for made in tiny if data else ():  # a tiny launcher makes what is missing
        (cwd / "runs" / made).parent.mkdir(parents=True, exist_ok=True)
        (cwd / "runs" / made).touch()
    setup = cwd / "setup_stub.sh"
    fail = 'setup_fail() { echo "$1" >&2; return 2; }'
    setup.write_text(f'set -euo pipefail\nSETUP_ROOT="{ROOT}"\n{fail}\nPYTHON="{echo}"\n')
    script = f'source() {{ case "$1" in */setup.sh) builtin source "{setup}";; *) builtin source "$@";; esac; }}; '
    script += "export -f source; exec bash " + " ".join(command)
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")} | {"NUM_PROCESSES": "1"}
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )


def arguments_of(command: list[str], cwd: Path, *, data: bool = True, **environment: str) -> list[str]:
    """What a launcher would start the trainer with."""
    done = launched(command, cwd, data=data, **environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["-m", "train_t2i", "train"], done.stdout
    return lines[3:]


@pytest.mark.parametrize("tiny", ["0", "1"])
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.stem)
def test_every_launcher_is_a_valid_run(launcher: Path, tiny: str, tmp_path: Path) -> None:
    settings = cli.parse(arguments_of([str(launcher)], tmp_path, TINY=tiny))
    assert settings.run.exp_name == launcher.stem
    sizes = {"_sd3_": "512", "qwen_image_edit": "1024", "direct_distill_qwen_image": "1328"}
    published = next((size for part, size in sizes.items() if part in f"{launcher.stem}_"), "1024")
    assert settings.run.resolution == ("64" if tiny == "1" else published)


@pytest.mark.parametrize("launcher", MULTI_NODE, ids=lambda path: path.stem)
def test_a_node_runs_the_single_node_launcher(launcher: Path, tmp_path: Path) -> None:
    """No setting is written twice."""
    single = ROOT / "scripts" / "single_node" / launcher.name
    assert arguments_of([str(launcher)], tmp_path) == arguments_of([str(single)], tmp_path)


def test_a_mean_table_has_one_row_a_model() -> None:
    mean_rows = runpy.run_path(str(ROOT / "scripts" / "mean_table.py"))["mean_rows"]

    def row(model: str, adherence: float, hps: float | None = None) -> dict:
        rest = {"clip": 0.5, "held_out": 0.25, "frechet": 2.0, "recall": 1.0, "ms_per_image": 8.0, "count": 500}
        return {"model": model, "network_calls": 4, "adherence": adherence, "hps": hps, **rest, "seed": 1000}

    several = [row("a-seed30", 0.5), row("b", 0.7, 0.1), row("a-seed31", 0.75), row("a-seed32", 1.0, 0.2)]
    first, second = mean_rows(several)
    assert (first["model"], first["adherence"], first["seeds"]) == ("a", 0.75, 3)
    assert first["hps"] is None  # not measured in all of them
    assert first["standard_deviation"]["adherence"] == 0.25
    assert first["standard_deviation"]["clip"] == 0
    for key, value in (("network_calls", 4), ("count", 500)):
        assert first[key] == second[key] == value
        assert isinstance(first[key], int)
    assert {key: second[key] for key in second if key in several[1]} == {
        k: v for k, v in several[1].items() if k != "seed"
    }
    assert (second["seeds"], second["standard_deviation"]) == (1, None)


def write_logs(run: Path, ticks: list[tuple[int, int, float, float]], ratio: int = 2) -> Path:
    """A run of (tick, step after it, seconds, GiB); every tick trains the guidance network, every second one the generator."""
    (run / "loss_logs").mkdir(parents=True)
    (run / "args.json").write_text("{}")
    lines = [
        {"tick": tick, "step": step, "samples_seen": 32 * tick, "seconds_tick": seconds, "peak_memory_gib": gib}
        for tick, step, seconds, gib in ticks
    ]
    for name, kept in (("gui", lines), ("gen", [line for line in lines if line["tick"] % ratio == 0])):
        (run / "loss_logs" / f"loss_{name}_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return run


def test_the_steps_that_fit_into_a_cell_follow_a_probe(tmp_path: Path) -> None:
    """Two slow steps to warm up, then four of 0.5 + 1.5 s."""
    steps_that_fit = runpy.run_path(str(ROOT / "scripts" / "cells.py"))["steps_that_fit"]
    slow = [(tick, 7 + tick // 2, 9.0, 1.0) for tick in range(15, 19)]
    steady = [(tick, 7 + tick // 2, 1.5 if tick % 2 == 0 else 0.5, 1.0) for tick in range(19, 27)]
    probe = write_logs(tmp_path / "probe", slow + steady)
    assert steps_that_fit(probe, 100.0) == 50
    assert steps_that_fit(probe, 99.9) == 49


def test_a_cell_costs_what_all_its_stages_cost(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / "cells.py"))["main"]
    write_logs(tmp_path / "cold", [(1, 0, 2.0, 1.5), (2, 1, 3.0, 1.75)])
    write_logs(tmp_path / "dmdr", [(3, 1, 4.0, 1.25), (4, 2, 5.0, 1.25)])
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "sd3-dmdr-4.json").write_text('{"runs": ["cold", "dmdr"], "seconds_before": 10}')
    teacher = {"model": "sd3-teacher", "network_calls": 50, "adherence": 0.93, "clip": None}
    (tmp_path / "table-sd3.json").write_text(json.dumps([teacher, {"model": "sd3-dmdr-4", "adherence": 0.92}]))
    main("table", str(tmp_path))
    first, second = json.loads((tmp_path / "table.json").read_text())
    assert first == teacher
    assert second["training_seconds"] == 10 + 2 + 3 + 4 + 5
    assert (second["prompts_seen"], second["peak_memory_gib"]) == (4 * 32, 1.75)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| sd3-teacher | 50 | 0.930 | - | - | - | - | - | - | - | - |"
    assert lines[3] == "| sd3-dmdr-4 | - | 0.920 | - | - | - | - | - | 24 | 128 | 1.75 |"


def test_published_one_step_recipe(tmp_path: Path) -> None:
    """The figures of DMDR's released SDXL scripts."""
    folder = ROOT / "scripts" / "single_node"
    cold = cli.parse(arguments_of([str(folder / "cold_start_sdxl.sh")], tmp_path))
    refl = cli.parse(arguments_of([str(folder / "dmdr_sdxl_refl.sh")], tmp_path))
    assert (cold.run.batch_size, cold.run.learning_rate_gen, cold.method.learning_rate_gui) == (8, 1e-7, 1e-7)
    assert (refl.run.batch_size, refl.run.learning_rate_gen, refl.method.learning_rate_gui) == (4, 5e-8, 5e-8)
    assert (cold.method.cfg_r, cold.method.ratio_update, cold.method.lora_scale_f) == (7, 5, 2)
    assert (refl.method.reward_clip_weight, refl.method.reward_hps_weight, refl.method.reward_margin) == (0.3, 0.3, 0.7)
    assert refl.method.magic_prompt == "Realistic photo"
    assert cold.run.sample_num_steps == refl.run.sample_num_steps == 1
    assert cold.run.teacher_cfg == refl.run.teacher_cfg == 7  # no variable of the scripts takes its place


# launcher: model, batch, lr of generator and guidance, cfg, shift, steps, first step with rewards, samples and checkpoints
# every, weights of CLIP and HPS: the table of DMDR's released scripts, whose six share the rest
SD3_ROWS = {
    "cold_start_sd3": ("3-medium", 8, 1e-6, 5e-7, 7, 3, 2001, 2001, 100, 500, None),
    "cold_start_sd35": ("3.5-large", 4, 1e-6, 2e-8, 4, 5, 2001, 2001, 100, 500, None),
    "dmdr_sd3_refl": ("3-medium", 4, 5e-7, 2e-7, 7, 3, 4001, 2000, 100, 500, (0.3, 0.3)),
    "dmdr_sd35_refl": ("3.5-large", 2, 1e-7, 5e-9, 4, 5, 3001, 2000, 100, 250, (0.1, 0.1)),
    "dmdr_sd3_srpo": ("3-medium", 4, 5e-7, 2e-7, 7, 3, 2301, 2000, 20, 50, (0.1, 5.0)),
    "dmdr_sd35_srpo": ("3.5-large", 2, 1e-7, 5e-9, 4, 5, 2301, 2000, 20, 50, (0.1, 5.0)),
}


@pytest.mark.parametrize("name", SD3_ROWS)
def test_published_sd3_recipes(name: str, tmp_path: Path) -> None:
    settings = cli.parse(arguments_of([str(ROOT / "scripts" / "single_node" / f"{name}.sh")], tmp_path))
    run, method = settings.run, settings.method
    model, batch, lr_gen, lr_gui, cfg, shift, steps, cold, samples, checkpoints, weights = SD3_ROWS[name]
    assert model in run.pretrained_model
    assert (run.batch_size, run.learning_rate_gen, method.learning_rate_gui) == (batch, lr_gen, lr_gui)
    assert (method.cfg_r, run.shift, run.max_train_steps, method.cold_start_iter) == (cfg, shift, steps, cold)
    assert (run.sample_steps, run.checkpoint_steps) == (samples, checkpoints)
    if weights:
        assert (method.reward_clip_weight, method.reward_hps_weight, method.reward_margin) == (*weights, 0.7)
        assert Path(str(run.resume_ckpt)).name == "step-2000.pt"
        assert (method.srpo, method.srpo_k) == ("srpo" in name, 0.1)
    assert (run.use_lora_gen, run.lora_rank, run.sample_num_steps, run.sample_type) == (True, 32, 4, "ode")
    assert (method.lora_scale_f, method.lora_scale_r, method.dynamic_step, method.cfg_f) == (2, 0.5, 2000, 1)
    assert (method.s_type_gen, method.s_type_gui, method.gui_a, method.gui_b) == ("uniform", "beta", 4, 1.5)
    assert (run.text_length, run.mixed_precision, run.use_8bit_adam, run.seed) == (128, "bf16", True, 30)
    assert (method.ratio_update, run.gradient_accumulation_steps, run.batch_size_test) == (5, 1, 2)


def test_environment_then_arguments_override(tmp_path: Path) -> None:
    launcher = str(ROOT / "scripts" / "single_node" / "cold_start_sdxl.sh")
    given = arguments_of([launcher, "--batch-size", "3"], tmp_path, BATCH_SIZE="2", LORA_RANK="4")
    settings = cli.parse(given)
    assert (settings.run.batch_size, settings.run.lora_rank) == (3, 4)
    assert cli.parse(arguments_of([launcher], tmp_path, BATCH_SIZE="2")).run.batch_size == 2


@pytest.mark.parametrize("line", ["scripts/single_node/cold_start_sdxl.sh", "scripts/single_node/dmdr_sdxl_refl.sh"])
def test_the_lines_users_know_work_from_their_folder(line: str) -> None:
    """``cd train_t2i/sdxl`` and ``bash scripts/single_node/NAME.sh``, through the real set-up and the real program."""
    done = subprocess.run(
        ["bash", line, "--dry-run"], cwd=ROOT / "train_t2i" / "sdxl", capture_output=True, text=True, check=False,
        env=os.environ | {"NUM_PROCESSES": "1", "VIRTUAL_ENV": str(Path(sys.prefix))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["exp_name"] == Path(line).stem


@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "fsdp2"])
def test_published_edit_recipe(backend: str, tmp_path: Path) -> None:
    """The launcher of each published launch says what its line does, as the script of its name takes it."""
    launcher = str(ROOT / "scripts" / "single_node" / f"train_qwen_image_edit_{backend}.sh")
    done = launched([launcher], tmp_path, NUM_PROCESSES="2")
    assert f"scripts/accelerate/{backend}.yaml" in done.stdout
    ours = cli.parse(arguments_of([launcher], tmp_path)).as_dict()
    line = cli.parse(translate(PUBLISHED, {})[0]).as_dict()
    differ = {name for name in ours if ours[name] != line[name]}
    assert differ == {
        "pretrained_model", "model_family", "train_data_dir", "output_dir", "exp_name", "trainable_modules", "sample_steps",
    }  # fmt: skip
    assert (ours["pretrained_model"], ours["trainable_modules"]) == ("Qwen/Qwen-Image-Edit", "")
    assert Path(ours["train_data_dir"]) == Path(line["train_data_dir"])


COLD_START = str(ROOT / "scripts" / "single_node" / "cold_start_sdxl.sh")


def starter(cwd: Path, **environment: str) -> str:
    """What stands between the interpreter and the trainer."""
    done = launched([COLD_START], cwd, **environment)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.splitlines()).partition(" train_t2i train ")[0]


def test_several_processes_start_by_accelerate(tmp_path: Path) -> None:
    accelerate = f"-m accelerate.commands.launch --config_file {ROOT}/scripts/accelerate/ddp.yaml --num_processes"
    assert starter(tmp_path, NUM_PROCESSES="2") == f"{accelerate} 2 -m"
    node = {"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    place = "--num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500"
    assert starter(tmp_path, NUM_PROCESSES="8", **node) == f"{accelerate} 16 {place} -m"


@pytest.mark.parametrize(("backend", "kind"), [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")])
def test_a_backend_is_a_config_of_accelerate(backend: str, kind: str, tmp_path: Path) -> None:
    file = ROOT / "scripts" / "accelerate" / f"{backend}.yaml"
    assert f"--config_file {file} " in starter(tmp_path, NUM_PROCESSES="2", BACKEND=backend)
    config = yaml.safe_load(file.read_text())
    assert config["distributed_type"] == kind
    assert kind == "FSDP" or config["deepspeed_config"]["zero_stage"] == int(backend[-1])


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    done = tiny_launcher("cold_start_sdxl", tmp_path, BACKEND="zero9")
    assert done.returncode == 2
    assert "BACKEND=zero9: unknown" in done.stderr
    assert "ddp, fsdp2, zero2, zero3" in done.stderr


@pytest.mark.parametrize(
    ("visible", "processes"), [("0,3", 2), ("GPU-1a,GPU-1b,GPU-1c", 3), ("2", 1), ("", 1), ("-1", 1), ("0,1,-1,2", 2)]
)
def test_a_process_for_every_visible_gpu(visible: str, processes: int, tmp_path: Path) -> None:
    line = starter(tmp_path, NUM_PROCESSES="", CUDA_VISIBLE_DEVICES=visible)
    assert line.endswith(f"--num_processes {processes} -m" if processes > 1 else "-m")


@pytest.mark.parametrize("variable", ["NUM_PROCESSES", "NUM_MACHINES"])
@pytest.mark.parametrize("value", ["0", "two", "1.5", "-1", "a[$(touch run_by_bash)]"])
def test_a_count_that_is_none_is_refused(variable: str, value: str, tmp_path: Path) -> None:
    done = launched([COLD_START], tmp_path, **{variable: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{variable}={value}: not a count\n"
    assert not (tmp_path / "run_by_bash").exists()


def test_torchs_launcher_waits_for_a_step_and_a_checkpoint(tmp_path: Path) -> None:
    assert launched([COLD_START], tmp_path).stderr == "3600\n"
    assert launched([COLD_START], tmp_path, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60").stderr == "60\n"


def test_the_prompts_are_where_they_were_fetched_or_in_the_folder_of_the_call(tmp_path: Path) -> None:
    name = "t2i-2m-filtered-prompts.txt"
    fetched = cli.parse(arguments_of([COLD_START], tmp_path)).run.data_path_train
    assert fetched == str(ROOT / "checkpoints" / name)
    (tmp_path / name).touch()
    assert cli.parse(arguments_of([COLD_START], tmp_path)).run.data_path_train == name


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_ignores_what_is_fetched_and_what_runs_write_but_no_tiny_weights() -> None:
    fetched = [
        "a.bin",
        "a.pt",
        "a.safetensors",
        "t2i-2m-filtered-prompts.txt",
        "stable-diffusion-xl-base-1.0/unet/a.bin",
    ]
    ignored = [*(f"checkpoints/{name}" for name in fetched), "train_t2i/sdxl/runs/a/log.txt", "runs/a/log.txt"]
    kept = ["checkpoints/manifest.toml", "checkpoints/tiny-sdxl/unet/a.safetensors", "train_t2i/sdxl/scripts"]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *ignored, *kept], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ignored


TINY_RUN = "--max-train-steps 1 --cold-start-iter 1 --sample-steps 0 --batch-size 2"


def tiny_launcher(name: str, cwd: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """TINY=1 on this interpreter, in a folder of its own."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OUTPUT_DIR", "DATA_PATH_TRAIN", "NUM_MACHINES")}
    clean |= {"TINY": "1", "NUM_PROCESSES": "1", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    script = ROOT / "scripts" / "single_node" / f"{name}.sh"
    return subprocess.run(
        ["bash", script, *flags], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", ["cold_start_sdxl_4step", "ode_init_sdxl"])
def test_a_rehearsal_makes_no_data(name: str, tmp_path: Path) -> None:
    done = tiny_launcher(name, tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_data_that_the_caller_names_is_not_made(tmp_path: Path) -> None:
    """A launcher that makes data fails here: what would make it only prints."""
    launcher = str(ROOT / "scripts" / "single_node" / "cold_start_sdxl_4step.sh")
    by_flag = arguments_of([launcher, "--data-path-train", "mine.txt"], tmp_path, data=False, TINY="1")
    by_name = arguments_of([launcher], tmp_path, data=False, TINY="1", DATA_PATH_TRAIN="mine.txt")
    assert [cli.parse(given).run.data_path_train for given in (by_flag, by_name)] == ["mine.txt", "mine.txt"]


def test_nodes_that_share_a_folder_make_the_data_once(tmp_path: Path) -> None:
    """The second waits for the first, and the trainer does not keep the lock."""
    python = tmp_path / "python"
    python.write_text(
        '#!/usr/bin/env bash\nfor last in "$@"; do :; done\n'
        '[[ "$*" != *shapes.scenes* ]] || { echo made >>made; sleep 1; touch "$last"; exit; }\n'
        "echo started >>started; while [[ $(wc -l <started) != 2 ]]; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    script = f'source() {{ case "$1" in */setup.sh) SETUP_ROOT="{ROOT}"; PYTHON="{python}";; *) builtin source "$@";; esac; }}; '
    script += f"set -e; export -f source; exec bash {ROOT}/scripts/single_node/cold_start_sdxl_4step.sh"
    clean = {"PATH": os.environ["PATH"], "TINY": "1", "NUM_PROCESSES": "1"}
    nodes = [subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=clean) for _ in range(2)]
    assert [node.wait(timeout=30) for node in nodes] == [0, 0]
    assert (tmp_path / "made").read_text() == "made\n"
    assert (tmp_path / "started").read_text() == "started\n" * 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_launcher_runs_in_an_empty_folder(tmp_path: Path) -> None:
    done = tiny_launcher("cold_start_sdxl_4step", tmp_path, *TINY_RUN.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "runs" / "prompts.txt").read_text().splitlines()) == 8000
    assert (tmp_path / "runs" / "cold_start_sdxl_4step" / "checkpoints" / "torch_units" / "step-1.pt").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero2"])
def test_a_signal_to_the_launcher_of_two_processes_saves(backend: str, tmp_path: Path) -> None:
    """Launcher, accelerate, torch's agent, two processes on the CPU: the signal passes through all of them."""
    run = tmp_path / "runs" / "cold_start_sdxl_4step"
    script = ROOT / "scripts" / "single_node" / "cold_start_sdxl_4step.sh"
    clean = {k: v for k, v in os.environ.items() if k not in ("OUTPUT_DIR", "DATA_PATH_TRAIN", "NUM_MACHINES")}
    clean |= {"TINY": "1", "NUM_PROCESSES": "2", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    clean |= {"BACKEND": backend, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--sample-steps", "0", "--batch-size", "1", "--ratio-update", "4", "--checkpoint-steps", "0"]
    with open(tmp_path / "out", "w") as out:
        launcher = subprocess.Popen(["bash", script, *flags], cwd=tmp_path, env=clean, stdout=out, stderr=out)
    try:
        log, end = run / "loss_logs" / "loss_gui_log.jsonl", time.monotonic() + 400
        while not (log.exists() and log.read_text()):
            assert launcher.poll() is None, (tmp_path / "out").read_text()[-3000:]
            assert time.monotonic() < end, (tmp_path / "out").read_text()[-3000:]
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=150)
    finally:
        launcher.kill()
    said = (tmp_path / "out").read_text()[-3000:]
    assert (run / ".exit_code").read_text() == "75\n", said
    (record,) = (run / "checkpoints" / "torch_units").iterdir()
    saved = torch.load(record, weights_only=True)
    assert (saved["world_size"], saved["backend"]) == (2, backend)


def multi_node(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The seed's multi-node line, from the seed's folder."""
    clean = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    return subprocess.run(
        ["bash", "scripts/multi_node/multi.sh", *flags], cwd=ROOT / "train_t2i" / "sdxl", env=clean | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_multi_node_dry_run_names_what_each_node_runs() -> None:
    done = multi_node(
        "--dry-run", "--magic-prompt", "it's; $(exit)", MASTER_ADDR="10.0.0.1", WORKER_NODES="10.0.0.2 10.0.0.3",
        NCCL_DEBUG="a b", WANDB_API_KEY="secret",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    for rank, line in enumerate(lines):
        words = shlex.split(line)
        assert {f"MACHINE_RANK={rank}", "NUM_MACHINES=3", "MASTER_ADDR=10.0.0.1", "NCCL_DEBUG=a b"} <= set(words)
        assert words[-3:] == ["scripts/multi_node/dmdr_sdxl_refl.sh", "--magic-prompt", "it's; $(exit)"]
        assert words[words.index("source") :][:3] == ["source", "/conda/bin/activate", "dmdr"]
    assert "secret" not in done.stdout


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, "MASTER_ADDR"),
        ({"MASTER_ADDR": "a"}, "WORKER_NODES"),
        ({"MASTER_ADDR": "a", "WORKER_NODES": "b; c"}, "b;"),
        ({"MASTER_ADDR": "a", "WORKER_NODES": "b", "TRAIN_SCRIPT": "none.sh"}, "none.sh"),
    ],
)
def test_multi_node_mistakes_get_one_line(environment: dict[str, str], named: str) -> None:
    done = multi_node("--dry-run", **environment)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[0]


def test_a_wrong_tiny_is_refused(tmp_path: Path) -> None:
    launcher = ROOT / "scripts" / "single_node" / "cold_start_sdxl.sh"
    done = subprocess.run(
        ["bash", launcher], env=os.environ | {"TINY": "yes"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "TINY=yes" in done.stderr


@pytest.mark.parametrize(
    "program", ['source "$SETUP"; echo went on', 'made() { source "$SETUP"; }; made || exit', 'bash "$SETUP"']
)
def test_an_environment_that_could_not_be_made_is_not_taken_for_one(program: str, tmp_path: Path) -> None:
    """Whether or not the caller looks at the outcome, which switches errexit off in all that it calls."""
    uv, environment = tmp_path / "bin" / "uv", tmp_path / "environment"
    uv.parent.mkdir()
    uv.write_text(
        '#!/usr/bin/env bash\n[[ "$1" == --version ]] || { mkdir -p "$UV_PROJECT_ENVIRONMENT"; exit 1; }\necho uv 99.0\n'
    )
    uv.chmod(0o755)
    clean = {"PATH": f"{uv.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-euc", program],
            env=clean | {"UV_PROJECT_ENVIRONMENT": str(environment), "SETUP": str(ROOT / "scripts" / "setup.sh")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "went on" not in done.stdout
        assert f"error: uv could not make {environment}" in done.stderr
        assert list(environment.iterdir()) == []
