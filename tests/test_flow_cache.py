"""The prompt cache under SD3, FLUX.1 and Qwen-Image: what is stored, and that training from it is the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_runs
import torch
from flow_models import FAMILIES, save_flow

from train_t2i.__main__ import main
from train_t2i.build import build_family
from train_t2i.config import Config
from train_t2i.prompt_cache import PromptCache

LENGTH = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {name: save_flow(root / name, name) for name in FAMILIES}


def cached(folder: Path, prompts: Path, out: Path, more: str = "") -> Path:
    flags = f"--pretrained-model {folder} --data-path-train {prompts} --out {out} --text-length {LENGTH} --mixed-precision no --batch-size 1"
    assert main(["cache", *flags.split(), *more.split()]) == 0
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_from_the_cache_is_the_same_run(
    name: str, folders: dict[str, Path], prompts_file: Path, tmp_path: Path
) -> None:
    """No encoder in memory, every number equal: losses, weights, optimizer states."""
    out = cached(folders[name], prompts_file, tmp_path / "cache")
    flags = f"--use-lora-gen --sample-num-steps 2 --sample-type ode --text-length {LENGTH} --batch-size 1 --batch-size-test 1"
    online = tiny_runs.train(tmp_path, "online", flags, model=folders[name], prompts=prompts_file)
    flags += f" --prompt-cache {out}"
    read = tiny_runs.train(tmp_path, "read", flags, model=folders[name], prompts=prompts_file)
    tiny.assert_same_logs(online, read)
    mine, theirs = (tiny_runs.weights(run, 2) for run in (read, online))
    assert tiny_runs.equal(mine, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_network_attends_to_is_what_is_stored(
    name: str, folders: dict[str, Path], prompts_file: Path, tmp_path: Path
) -> None:
    out = cached(folders[name], prompts_file, tmp_path / "cache")
    run = Config(
        model_family=name, pretrained_model=str(folders[name]), text_length=LENGTH, mixed_precision="no",
        guidance_embed=2.5 if name == "flux" else 3.5,
    )  # fmt: skip
    online = build_family(run, torch.float32)
    read = build_family(type(run)(**{**vars(run), "prompt_cache": str(out)}), torch.float32)
    prompts = prompts_file.read_text().splitlines()[:3]
    stored = PromptCache(out)
    for prompt in prompts:
        alone, found = online.encode([prompt], ""), read.encode([prompt], "")
        assert torch.equal(alone.tokens, found.tokens)
        assert torch.equal(stored.embedding(prompt)[0], alone.tokens[0])
        assert alone.negative is not None
        assert found.negative is not None
        assert torch.equal(alone.negative.tokens, found.negative.tokens)
    together = read.encode(prompts, "")
    if name == "flux":  # a setting of the run, not of the cache
        assert together.guidance is not None
        assert together.guidance.tolist() == [2.5] * 3
    padded = online.encode(prompts).mask
    assert (together.mask is None) == (padded is None)


def test_a_cache_of_another_length_is_refused(
    folders: dict[str, Path], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cached(folders["flux"], prompts_file, tmp_path / "cache")
    told = tiny_runs.refused(
        capsys, "train", "--pretrained-model", folders["flux"], "--data-path-train", prompts_file, "--use-lora-gen",
        "--output-dir", tmp_path, "--prompt-cache", out, "--text-length", "32", "--mixed-precision", "no", "--resolution", "64",
    )  # fmt: skip
    assert "text_length: then 24, now 32" in told
