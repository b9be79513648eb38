"""Files that cannot be used: one line and exit code 2 before any model loads."""

from __future__ import annotations

import io
import os

import pytest
import torch

from train_t2i.errors import EXIT_USER


@pytest.fixture
def refused(trainer, monkeypatch):
    """The one error line of a run that must not get as far as loading a model."""

    def run(more: str, method: str = "dmdr", *, loads: bool = False, hint: str = "hint: ") -> str:
        if not loads:
            monkeypatch.setattr("train_t2i.build.build_family", lambda *args: pytest.fail("a model was loaded"))
        ended = trainer.ends("run", more, method)
        assert ended.code == EXIT_USER, ended.err
        assert "Traceback" not in ended.err
        lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, ended.err
        assert hint in ended.err
        return lines[0]

    return run


PROMPT_FILES = {
    "missing.txt": (None, "missing.txt"),
    "empty.txt": (b"", "empty.txt"),
    "blank.txt": (b"\n  \n\t\n", "blank.txt"),
    "latin.txt": (b"a red circle\nna\xefve\n", "latin.txt:2"),
    "nul.txt": (b"a red circle\na\x00b\n", "nul.txt:2"),
    "none.jsonl": (b'{"text": "a"}\n{"words": "b"}\n', "none.jsonl:2"),
    "none.csv": (b"name,age\nx,1\n", "none.csv"),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompt_files(refused, tmp_path, name):
    content, told = PROMPT_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert told in refused(f"--data-path-train {tmp_path / name}")


def test_prompts_of_the_sample_images(refused, tmp_path):
    assert "samples.txt" in refused(f"--sample-prompts {tmp_path / 'samples.txt'} --sample-steps 1")


def test_data_of_the_other_methods(refused, tmp_path, prompts_file):
    assert "not a pairs folder" in refused(f"--data-path-train {tmp_path}", "direct")
    assert "is not a table" in refused(f"--data-path-train {prompts_file}", "sft")


def test_pairs_of_another_size(refused):
    assert "latents of shape (4, 4, 4), this run needs (4, 8, 8)" in refused("--resolution 64", "direct", loads=True)


def test_models(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"--pretrained-model {tmp_path / 'empty'}" in refused(f"--pretrained-model {tmp_path / 'empty'}")
    assert not (tmp_path / "run").exists()  # nothing was made for a run that cannot be


@pytest.mark.parametrize("flag", ["--vae", "--tiny-vae", "--generator-init", "--xl-ode-pretrain-path"])
def test_other_weights(refused, tmp_path, towers, flag):
    beside = f"--clip-reward-model {towers['clip']}" if flag == "--tiny-vae" else ""
    told = refused(f"{beside} {flag} {tmp_path / 'absent'}", loads="vae" in flag)
    assert f"{flag} {tmp_path / 'absent'}" in told


class Canary:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['CANARY']}",)


@pytest.mark.parametrize("flag", ["--clip-reward-model", "--hpsv2-reward-model"])
@pytest.mark.parametrize("kind", ["absent", "empty", "truncated", "pickle", "another shape", "text"])
def test_reward_files_are_checked_even_if_never_reached(refused, tmp_path, towers, monkeypatch, flag, kind):
    monkeypatch.setenv("CANARY", str(tmp_path / "executed"))
    folder = towers["clip" if "clip" in flag else "hpsv2"]
    whole = (folder / "open_clip_model.safetensors").read_bytes()
    buffer = io.BytesIO()
    torch.save({"state_dict": Canary()} if kind == "pickle" else {"weight": torch.zeros(3)}, buffer)
    content = {
        "empty": b"", "truncated": whole[: len(whole) // 2], "text": b"<html>not found</html>",
        "pickle": buffer.getvalue(), "another shape": buffer.getvalue(),
    }  # fmt: skip
    path = tmp_path / ("tower.safetensors" if kind in ("empty", "truncated") else "tower.pt")
    if kind != "absent":
        path.write_bytes(content[kind])
    assert str(path) in refused(f"{flag} {path} --cold-start-iter 1000", hint="; ")  # the way out is in the line
    assert not (tmp_path / "executed").exists()


def test_checkpoints(refused, tmp_path):
    assert "no such file" in refused(f"--resume-ckpt {tmp_path / 'step-3.pt'}")
    assert "no complete checkpoint" in refused("--resume-ckpt latest")
    foreign = tmp_path / "elsewhere.pt"
    foreign.write_bytes(b"x")
    assert str(foreign) in refused(f"--resume-ckpt {foreign}")
    inside = tmp_path / "other" / "checkpoints" / "torch_units" / "step-3.pt"
    inside.parent.mkdir(parents=True)
    torch.save({"state": Canary.__name__}, inside)
    assert "is damaged, or not a checkpoint" in refused(f"--resume-ckpt {inside}")


def test_output_folders(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(f"--output-dir {tmp_path / 'file'}")
    (tmp_path / "taken").write_text("")
    assert str(tmp_path / "taken") in refused("--exp-name taken")
    assert "/proc/nothing" in refused("--output-dir /proc/nothing")


def test_a_resolution_that_the_vae_cannot_take(refused, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,) * 5, down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5,
        layers_per_block=1, norm_num_groups=8, latent_channels=4,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    assert "--resolution 40x40: the model takes multiples of 16" in refused(
        f"--vae {tmp_path / 'vae'} --resolution 40", loads=True
    )
