"""docs/extending.md as its readers would do it: its files are written, its diffs applied, and what comes of it is run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from shapes.tokenizer import new_t5_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
FILES = re.findall(r'```python title="(.+?)"\n(.*?)```', PAGE, re.DOTALL)
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
SAME_AS_THE_PIPELINE = """
import sys, torch
from diffusers import AuraFlowPipeline
from train_t2i.families import load_family
from train_t2i.sampling import many_step

folder, size = sys.argv[1], 32
pipe, seen = AuraFlowPipeline.from_pretrained(folder, torch_dtype=torch.float32), []
x = torch.randn(1, 4, size // 4, size // 4, generator=torch.Generator().manual_seed(0))

def keep(pipe, i, t, told):
    seen.append(told["latents"])
    return {}

image = pipe("a red circle", height=size, width=size, num_inference_steps=3, latents=x, guidance_scale=3.0,
             max_sequence_length=16, callback_on_step_end=keep, output_type="pt").images
family = load_family("auto", folder, size_px=(size, size), text_length=16)
net, inputs = family.load(torch.float32), []
cond = family.encode(["a red circle"], "")

def x0_at(x, t):
    inputs.append(x)
    both = family.call(net, torch.cat([x, x]), t.expand(2), cond.with_negative())
    negative, positive = both.chunk(2)
    return family.path.to_x0(x, family.guide(positive, negative, 3.0), t)

with torch.no_grad():
    mine = many_step(x0_at, family.path, 3, x)
for found, expected in zip([*inputs[1:], mine], seen, strict=True):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
torch.testing.assert_close(family.decode(mine), image, rtol=1e-4, atol=1e-4)
print("same")
"""


def apply(diff: str, root: Path) -> None:
    """Each hunk's old lines stand in the file exactly once; new ones take their place."""
    for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        head, *hunks = re.split(r"^@@\n", part, flags=re.MULTILINE)
        path = root / head.splitlines()[0]
        for hunk in hunks:
            lines = hunk.splitlines()
            old = "".join(f"{line[1:]}\n" for line in lines if line[:1] in "- ")
            new = "".join(f"{line[1:]}\n" for line in lines if line[:1] in "+ ")
            text = path.read_text(encoding="utf-8")
            assert text.count(old) == 1, (path, old)
            path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with everything that the page adds."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("train_t2i", "rewards", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    for name, text in FILES:
        (root / name).write_text(text, encoding="utf-8")
    for diff in DIFFS:
        apply(diff, root)
    return root


@pytest.fixture(scope="module")
def aura_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small AuraFlow with random weights, in its true format."""
    tokenizer = new_t5_tokenizer()
    width = 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = AuraFlowPipeline(
            tokenizer,
            UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
            AutoencoderKL(
                block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
            ),
            AuraFlowTransformer2DModel(
                sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=width, caption_projection_dim=32, pos_embed_max_size=256,
            ),
            FlowMatchEulerDiscreteScheduler(shift=1.73),
        )  # fmt: skip
    folder = tmp_path_factory.mktemp("aura") / "flow"
    pipe.save_pretrained(folder)
    return folder


def python(root: Path, *arguments: str) -> str:
    """What a Python in the copy prints."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_is_read_whole_and_its_diffs_apply(extended: Path) -> None:
    assert "AuraFlow" in (extended / "train_t2i/families/__init__.py").read_text(encoding="utf-8")
    assert [name for name, _ in FILES] == [
        "my_rewards.py",
        "train_t2i/methods/guided.py",
        "train_t2i/families/aura_flow.py",
    ]
    assert len(DIFFS) == 2


@pytest.mark.slow
def test_the_family_is_its_stock_pipeline(extended: Path, aura_flow: Path) -> None:
    assert python(extended, "-c", SAME_AS_THE_PIPELINE, str(aura_flow)).endswith("same\n")


@pytest.mark.slow
def test_method_family_and_reward_train(extended: Path, aura_flow: Path, tmp_path: Path) -> None:
    common = shlex.split(
        "-m train_t2i train --resolution 32 --mixed-precision no --batch-size 2 --sample-steps 0 --max-train-steps 2 "
        "--learning-rate-gen 1e-2 --text-length 16 --sample-num-steps 2 --batch-size-test 2 --teacher-num-steps 2"
    )
    told = [*common, "--pretrained-model", str(aura_flow), "--output-dir", str(tmp_path)]
    told += ["--data-path-train", str(tiny.save_prompts(tmp_path / "prompts.txt"))]
    python(extended, *told, "--exp-name", "guided", "--method", "guided", "--guidance", "3")
    losses = tiny.log_lines(tmp_path / "guided")
    assert len(losses) == 2
    assert all(line["loss"] > 0 for line in losses)  # the teacher is guided, the generator begins as it is without
    rewarded = [
        "--extra-rewards",
        "0.1*my_rewards:warmth",
        "--cold-start-iter",
        "0",
        "--lora-rank",
        "2",
        "--ratio-update",
        "1",
    ]
    python(extended, *told, "--exp-name", "dmdr", "--method", "dmdr", "--use-lora-gen", "on", *rewarded)
    assert "my_rewards:warmth" in (tmp_path / "dmdr/args.json").read_text(encoding="utf-8")
    assert all("reward_warmth" in line for line in tiny.log_lines(tmp_path / "dmdr"))
