"""ArcFlow: what a segment's loss is made of, whose gradients go where, and that a run of it goes on bit for bit."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import tiny_runs
import torch
import torch.nn.functional as F
from flow_models import CFG, save_flow
from PIL import Image
from safetensors.torch import load_file
from test_methods import assert_close
from tiny_runs import stopped_at
from torch import Tensor

from train_t2i import build
from train_t2i.__main__ import main
from train_t2i.adapters import Replaced
from train_t2i.config import ArcFlowConfig, Config, Settings
from train_t2i.errors import UserError
from train_t2i.families.flow import pack
from train_t2i.methods.arcflow import LOSS_SCALE, ArcFlow
from train_t2i.methods.base import Batch, Clock
from train_t2i.networks import Networks
from train_t2i.policies import match_window
from train_t2i.randomness import Draw
from train_t2i.schedule import power_decay, shift_time
from train_t2i.sheet import SHEET_SEED
from train_t2i.student import load_student

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a large blue square left of a small green cross, grey background"]
NAMES = ("flux", "qwen_image")
SHIFT = 3.2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("arcflow")
    return {name: save_flow(root / name, name) for name in (*NAMES, "sd3")}


def arcflow(folder: Path, steps: int = 2, **config) -> ArcFlow:
    settings = build.resolved(
        Settings(
            Config(
                method="arcflow", pretrained_model=str(folder), use_lora_gen=True, sample_num_steps=steps, shift=SHIFT,
                resolution="48x32", text_length=24, mixed_precision="no", lora_rank=2,
            ),
            ArcFlowConfig(**{"num_components": 4, "mixing_steps": 0, "distill_cfg": CFG[folder.name], **config}),
        )
    )  # fmt: skip
    family = build.build_family(settings.run, torch.float32)
    networks = build.assemble(
        settings, family, uses=ArcFlow.uses, trains=ArcFlow.trains, dtype=torch.float32, place=lambda net, blocks: None
    )
    return build.build_method(settings, networks, CPU, ())


def shaken(algorithm: ArcFlow) -> ArcFlow:
    """With a generator that has left the teacher."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in algorithm.setting.networks.parameters("generator"):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return algorithm


def rolled(algorithm: ArcFlow, rows=range(2), clock: Clock | None = None):
    return algorithm.rollout(Batch([10 + row for row in rows], [PROMPTS[row] for row in rows]), clock or Clock(9, 9))


def update(algorithm: ArcFlow, rollouts, clock: Clock | None = None) -> tuple[list[float], list[Tensor]]:
    """(loss of every part, gradients) of one update, each part back-propagated before the next."""
    networks, found = algorithm.setting.networks, []
    for parameter in networks.parameters("generator"):
        parameter.grad = None
    with networks.updating("generator"):
        for rollout in rollouts:
            for loss, _ in algorithm.losses("generator", rollout, clock or Clock(9, 9)):
                (loss / len(rollouts)).backward()
                found.append(float(loss.detach()))
    return found, [
        p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in networks.parameters("generator")
    ]


# -- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["momentum", "gmflow"])
@pytest.mark.parametrize("name", NAMES)
def test_it_begins_as_the_teacher_without_guidance(folders, name, policy, monkeypatch):
    """With the noise of its biases off, every component is the teacher's velocity, in every latent cell."""
    monkeypatch.setattr("train_t2i.policy_head.BIAS_STD", 0.0)
    algorithm = arcflow(folders[name], policy=policy)
    rollout, networks = rolled(algorithm), algorithm.setting.networks
    source = torch.full((2,), 1.0)
    mine = algorithm._policy("generator", rollout.noise, source, rollout.cond)
    theirs = networks.predict("teacher", rollout.noise, source, rollout.cond)
    torch.testing.assert_close(mine.velocity(rollout.noise, source), theirs, rtol=1e-4, atol=1e-5)
    if policy == "momentum":
        for component in mine.means.unbind(dim=1):
            torch.testing.assert_close(component, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(mine.log_gates, torch.zeros_like(mine.log_gates))
        momenta = mine.log_momenta.exp().amax(dim=(0, 2, 3, 4))
        torch.testing.assert_close(momenta, torch.tensor([0.2, (0.2 * 4) ** 0.5, 4.0]))


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_stays_what_it_was(folders, name):
    """Bit for bit the network that was loaded, after the generator's own layers have changed."""
    algorithm = arcflow(folders[name])
    rollout, networks, family = rolled(algorithm), algorithm.setting.networks, algorithm.setting.family
    t = torch.tensor([0.9, 0.4])
    plain = family.call(family.load(torch.float32), rollout.noise, t, replace(rollout.cond, negative=None))
    student = networks.predict("generator", rollout.noise, t, rollout.cond)
    shaken(algorithm)
    assert torch.equal(networks.predict("teacher", rollout.noise, t, rollout.cond), plain.detach())
    assert not torch.equal(networks.predict("generator", rollout.noise, t, rollout.cond), student)
    replaced = [n for n, m in networks.modules["base"].named_modules() if isinstance(m, Replaced)]
    assert replaced == ["norm_out", "proj_out"]


def test_what_is_trained_is_feed_forward_time_and_head(folders):
    for name in NAMES:
        algorithm = arcflow(folders[name])
        names = {
            key.split(".lora_")[0].split(".own.")[0] for key in algorithm.setting.networks.named_parameters("generator")
        }  # fmt: skip
        inside = {n for n in names if "transformer_blocks" in n}
        assert names - inside == {
            "norm_out", "proj_out", "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
        }  # fmt: skip
        assert inside
        assert not [n for n in inside if "attn" in n]
    last = [
        n for n in inside if n.startswith("transformer_blocks.1.")
    ]  # Qwen-Image's last block: its text goes nowhere
    assert sorted(last) == ["transformer_blocks.1.img_mlp.net.0.proj", "transformer_blocks.1.img_mlp.net.2"]


def test_other_families_are_told_so(folders):
    with pytest.raises(UserError, match="--method arcflow is for flux and qwen_image"):
        arcflow(folders["sd3"], distill_cfg=1.0)


# -- the loss --------------------------------------------------------------------------------------------------------


def segment_by_hand(algorithm: ArcFlow, rollout, i: int, x: Tensor, mixing: float) -> tuple[Tensor, Tensor]:
    """One segment, written out query by query, the teacher asked each time; (loss, where it ends)."""
    config, networks, draw = algorithm.config, algorithm.setting.networks, rollout.draw
    n, parts = config.num_queries, algorithm.parts
    raw = torch.full((len(x),), 1 - i / parts)
    source, end = shift_time(raw, SHIFT), shift_time(raw - 1 / parts, SHIFT)
    policy = algorithm._policy("generator", x, source, rollout.cond)
    mask = draw.uniforms(f"gate_dropout/{i}", config.num_components) < config.gate_dropout
    way = policy.detach().with_dropped(mask)
    window = match_window(1 / parts, config.window_substeps)
    reach = 1 / parts - window
    ours = draw.uniforms(f"student_gap/{i}", n).sort(dim=1).values * (1 - mixing) * reach
    theirs = draw.uniforms(f"teacher_gap/{i}", n - 1).sort(dim=1).values
    ends = torch.cat([torch.zeros(len(x), 1), theirs, torch.ones(len(x), 1)], dim=1) * mixing * reach
    tau, sigma, errors = raw, source, []
    for j in range(n):
        tau = tau - (ours[:, j] - (ours[:, j - 1] if j else 0))
        a = shift_time(tau, SHIFT)
        x_a = way.step(x, sigma, a)
        velocity = networks.predict("teacher", x_a, a, rollout.cond, cfg=config.distill_cfg)
        tau = tau - (ends[:, j + 1] - ends[:, j])
        sigma = shift_time(tau.clamp(min=0), SHIFT)
        mean = policy.mean_velocity(x_a, a, shift_time((tau - window).clamp(min=0), SHIFT))
        errors.append(F.mse_loss(mean, velocity))
        x = x_a + (sigma - a).reshape(-1, 1, 1, 1) * velocity if mixing else x_a
    return LOSS_SCALE * torch.stack(errors).mean(), way.step(x, sigma, end).detach()


@pytest.mark.parametrize("policy", ["momentum", "gmflow"])
@pytest.mark.parametrize("mixing_steps", [0, 30], ids=["own_way", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_segment_is_its_written_out_form(folders, name, mixing_steps, policy):
    """Values and gradients; where nothing is mixed, also that one batch of all queries is the queries one by one."""
    algorithm = shaken(arcflow(folders[name], mixing_steps=mixing_steps, policy=policy))
    rollout, clock = rolled(algorithm), Clock(9, 9)
    mixing = 0.7 if mixing_steps else 0.0
    losses, gradients = update(algorithm, [rollout])
    networks, x, expected = algorithm.setting.networks, rollout.noise, []
    assert algorithm.mixing(clock.step) == pytest.approx(mixing)
    with networks.updating("generator"):
        for i in range(2):
            loss, x = segment_by_hand(algorithm, rollout, i, x, mixing)
            expected.append(loss / 2)
        found = torch.autograd.grad(sum(expected), networks.parameters("generator"), allow_unused=True)
    assert losses == pytest.approx([float(loss) for loss in expected], rel=1e-4)
    by_hand = [
        torch.zeros_like(p) if g is None else g for p, g in zip(networks.parameters("generator"), found, strict=True)
    ]
    assert_close(gradients, by_hand, rtol=1e-3)


def test_queries_on_the_students_own_way_are_one_call(folders):
    """Of a segment of four queries: one call of four times the rows instead of four."""
    calls = {}
    for mixing_steps in (0, 30):
        algorithm = arcflow(folders["flux"], mixing_steps=mixing_steps)
        rollout = rolled(algorithm)
        before = algorithm.setting.networks.num_calls
        update(algorithm, [rollout])
        calls[mixing_steps] = algorithm.setting.networks.num_calls - before
    assert calls == {0: 2 * (1 + 1), 30: 2 * (1 + 4)}


def test_no_segment_reaches_into_another(folders):
    """The second segment's gradient does not go through its start; both summed are both one after the other."""
    algorithm = shaken(arcflow(folders["flux"]))
    rollout, networks = rolled(algorithm), algorithm.setting.networks
    _, apart = update(algorithm, [rollout])
    for parameter in networks.parameters("generator"):
        parameter.grad = None
    with networks.updating("generator"):
        sum(loss for loss, _ in algorithm.losses("generator", rollout, Clock(9, 9))).backward()
    assert_close(apart, [p.grad for p in networks.parameters("generator")], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_what_its_rows_are_alone(folders, name):
    algorithm = shaken(arcflow(folders[name], mixing_steps=30))
    together, gradients = update(algorithm, [rolled(algorithm)])
    apart, of_rows = update(algorithm, [rolled(algorithm, [row]) for row in range(2)])
    assert sum(together) == pytest.approx(sum(apart) / 2, rel=1e-4)
    assert_close(gradients, of_rows, rtol=1e-3)


def test_recomputation_changes_no_gradient(folders):
    algorithm = shaken(arcflow(folders["qwen_image"], mixing_steps=30))
    plain = update(algorithm, [rolled(algorithm)])
    algorithm.setting.networks.modules["base"].enable_gradient_checkpointing()
    algorithm.setting.networks.modules["base"].train()
    again = update(algorithm, [rolled(algorithm)])
    assert again[0] == plain[0]
    assert_close(again[1], plain[1], rtol=1e-5)


def test_one_component_is_the_linear_shortcut(folders):
    """K = 1: each step is an Euler step along the network's one velocity."""
    algorithm = shaken(arcflow(folders["flux"], num_components=1))
    rollout = rolled(algorithm)
    losses, _ = update(algorithm, [rollout])
    assert all(loss > 0 for loss in losses)
    made = algorithm.sample(rollout.cond, rollout.noise, lambda i: rollout.noise)
    x, grid = rollout.noise, algorithm.setting.grid
    for i in range(2):
        out = algorithm.setting.networks.predict("generator", x, grid[i].expand(2), rollout.cond)
        x = x - (grid[i] - grid[i + 1]) * out[:, :16]
    torch.testing.assert_close(made, x, rtol=1e-5, atol=1e-5)


def test_a_sample_is_where_the_trained_ways_end(folders):
    """Without dropped gates the starts of the segments in training are the states of sampling."""
    algorithm = shaken(arcflow(folders["flux"], gate_dropout=0.0))
    rollout, x = rolled(algorithm), None
    x = rollout.noise
    for i in range(2):
        with torch.no_grad():
            _, x = algorithm._segment("generator", rollout, x, i, 0.0)
    torch.testing.assert_close(algorithm.sample(rollout.cond, rollout.noise, lambda i: x), x, rtol=1e-4, atol=1e-4)


def test_the_mixing_ratio_falls_to_zero(folders):
    algorithm = arcflow(folders["flux"], mixing_steps=4)
    assert [algorithm.mixing(step) for step in (0, 1, 2, 4, 9)] == [1.0, 0.75, 0.5, 0.0, 0.0]


GOLDEN = {100: 0.0, 101: 0.00390625, 110: 0.466507380, 200: 0.923483222, 1000: 0.991155391, 14999: 0.999463213}


@pytest.mark.parametrize("step", GOLDEN)
def test_the_average_is_of_powers(step):
    assert power_decay(step, 100, 7.0) == pytest.approx(GOLDEN[step], abs=1e-9)
    assert power_decay(50, 100, 7.0) == 0.0


# -- whole runs ------------------------------------------------------------------------------------------------------


FLAGS = (
    "--use-lora-gen --lora-rank 2 --sample-num-steps 2 --shift 3.2 --text-length 24 --num-components 3 --num-queries 2 "
    "--mixing-steps 3 --distill-cfg 2 --ema-start 1 --max-train-steps 4 --max-grad-norm 50 --adam-weight-decay 0 "
)


def train(root: Path, name: str, more: str, model: Path, prompts: Path) -> Path:
    return tiny_runs.train(root, name, FLAGS + more, "arcflow", model=model, prompts=prompts)


@pytest.mark.parametrize(("name", "policy"), [("flux", "momentum"), ("qwen_image", "momentum"), ("flux", "gmflow")])
def test_a_run_goes_on_bit_for_bit(name, policy, folders, prompts_file, tmp_path):
    """The average of the weights too, through steps of mixed ways and of none."""
    more = f"--policy {policy} --gradient-checkpointing"
    whole = train(tmp_path, "whole", more, folders[name], prompts_file)
    again = train(tmp_path, stopped_at(whole, 2, "cut").name, f"{more} --auto-resume", folders[name], prompts_file)
    tiny.assert_same_checkpoint(whole, again, 4)
    tiny.assert_same_logs(whole, again)
    lines = tiny.log_lines(whole)
    assert [line["mixing"] for line in lines] == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-6)
    for line in lines:
        assert line["loss"] == pytest.approx((line["loss_segment_0"] + line["loss_segment_1"]) / 2, rel=1e-5)


@pytest.fixture(scope="module")
def run(folders, prompts_file, tmp_path_factory) -> Path:
    more = "--sample-steps 4 --learning-rate-gen 0.2"  # the average lies visibly behind the weights
    return train(tmp_path_factory.mktemp("run"), "run", more, folders["flux"], prompts_file)


def test_what_is_sampled_is_the_average(run, folders):
    saved = run / "checkpoints" / "accelerator_1" / "step-4"
    weights, mean = load_file(saved / "model.safetensors"), load_file(saved / "ema.safetensors")
    assert weights.keys() == mean.keys()
    named = dict(load_student(str(run)).network.named_parameters())
    assert all(torch.equal(named[key], value) for key, value in mean.items())
    assert any(not torch.equal(weights[key], value) for key, value in mean.items())


def test_the_sheet_shows_the_average_too(run):
    """Its images are those of the average at the sheet's own noise, and not those of the weights."""
    folder, student = run / "samples" / "step 4", load_student(str(run))
    prompts = (folder / "prompts.txt").read_text().splitlines()
    noise = Draw(SHEET_SEED, 0, range(len(prompts)), CPU).normal("noise", student.latent_shape)
    shown = [np.asarray(Image.open(path)).astype(float) / 255 for path in sorted(folder.glob("student_*.png"))]

    def apart() -> float:
        cond = student.family.encode(prompts, None)
        made = student.family.decode(student.sample(cond, noise, lambda i: noise)).detach().permute(0, 2, 3, 1)
        return float(np.abs(np.stack(shown) - made.numpy()).max())

    assert apart() < 0.0025  # half of a step of eight bits
    weights = load_file(run / "checkpoints" / "accelerator_1" / "step-4" / "model.safetensors")
    load_saved(dict(student.network.named_parameters()), weights)
    assert apart() > 0.02


def load_saved(named: dict[str, torch.nn.Parameter], weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in weights.items():
            named[key].copy_(value)


def test_a_run_that_goes_on_begins_with_the_same_sheet(folders, prompts_file, tmp_path):
    """Its first images are of the average, as those that the stopped run drew."""
    more = "--sample-steps 2 --learning-rate-gen 0.2"
    whole = train(tmp_path, "whole", more, folders["flux"], prompts_file)
    cut = stopped_at(whole, 2, "cut")
    shown = [path.read_bytes() for path in sorted((cut / "samples" / "step 2").glob("*.png"))]
    again = train(tmp_path, "cut", f"{more} --auto-resume", folders["flux"], prompts_file)
    assert shown
    assert [path.read_bytes() for path in sorted((again / "samples" / "step 2").glob("*.png"))] == shown


def test_the_exported_files_hold_the_adapter(run):
    """The LoRA as peft saves it; the layers of its own under the network's names."""
    folder = run / "checkpoints" / "lora_gen" / "step-4"
    lora, replaced = load_file(folder / "adapter_model.safetensors"), load_file(folder / "replaced.safetensors")
    assert all(key.startswith("base_model.model.") and ".lora_" in key for key in lora)
    assert {key.split(".")[0] for key in replaced} == {"norm_out", "proj_out"}
    assert "proj_out.means.weight" in replaced
    assert "norm_out.linear.weight" in replaced


def test_the_momenta_learn_at_a_rate_of_their_own(folders, prompts_file, tmp_path):
    """Adam's first step is as long as its rate."""
    started = train(tmp_path, "start", "--learning-rate-gen 0 --max-train-steps 1", folders["flux"], prompts_file)
    moved = train(tmp_path, "moved", "--learning-rate-gen 1e-3 --max-train-steps 1", folders["flux"], prompts_file)
    first, second = (
        load_file(r / "checkpoints" / "accelerator_1" / "step-1" / "model.safetensors") for r in (started, moved)
    )  # fmt: skip
    far = {key: float((second[key] - first[key]).abs().max()) for key in first}
    for key, distance in far.items():
        if key.startswith("proj_out.own."):
            assert distance == pytest.approx(1e-4 if "log_momenta" in key else 1e-3, rel=0.05), key


def test_a_generator_without_a_lora_is_refused(folders, prompts_file, tmp_path, capsys):
    arguments = tiny_runs.arguments(tmp_path, "x", FLAGS, "arcflow", model=folders["flux"], prompts=prompts_file)
    arguments.remove("--use-lora-gen")
    assert main(arguments) == 2
    assert "give --use-lora-gen" in capsys.readouterr().err


def test_networks_call_the_layers_of_the_adapter_that_is_on(folders):
    networks: Networks = arcflow(folders["flux"]).setting.networks
    layer = networks.modules["base"].proj_out
    assert isinstance(layer, Replaced)
    assert layer.active is None
    with networks.updating("generator"):
        rollout = rolled(arcflow(folders["flux"]))
        networks.predict("generator", rollout.noise, torch.ones(2), rollout.cond)
        assert layer.active == "generator"  # stays on for the recomputation in backward
    assert layer.active is None


# -- in other hands --------------------------------------------------------------------------------------------------


def on_the_base(base, merged):
    """A merged folder with everything else from the base model, as docs/arcflow.md has it."""
    name = json.loads((merged / "transformer" / "config.json").read_text())["_class_name"]
    net = getattr(diffusers, name).from_pretrained(merged, subfolder="transformer", torch_dtype=torch.float32)
    times = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(merged, subfolder="scheduler")
    return diffusers.DiffusionPipeline.from_pretrained(
        base, transformer=net, scheduler=times, custom_pipeline=str(merged), trust_remote_code=True,
        torch_dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_folders_sample_as_the_student_does(name, folders, prompts_file, tmp_path):
    """A stock network of more channels, and the folder's own pipeline code, which needs nothing of ours."""
    run = train(tmp_path, "run", "--max-train-steps 3 --learning-rate-gen 1e-2", folders[name], prompts_file)
    out = tmp_path / "exported"
    assert main(["export", str(run), "--out", str(out)]) == 0
    code = (out / "pipeline.py").read_text()
    assert "train_t2i" not in code
    spec = importlib.util.spec_from_file_location(f"exported_{name}", out / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pipe = module.PolicyPipeline.from_pretrained(out)
    assert pipe.transformer.proj_out.out_features == 4 * (3 * 16 + 3 + 2)
    student = load_student(str(run))
    call = json.loads((out / "recommended.json").read_text())
    assert call["num_inference_steps"] == 2
    noise = torch.randn((2, *student.latent_shape), generator=torch.Generator().manual_seed(0))
    cond = student.family.encode(PROMPTS, None)
    mine = student.sample(cond, noise, lambda i: noise)
    merged = tmp_path / "merged"
    assert main(["export", str(run), "--to", "merged", "--out", str(merged)]) == 0
    for made in (pipe, on_the_base(folders[name], merged)):
        made.set_progress_bar_config(disable=True)
        theirs = made(PROMPTS, latents=pack(noise), output_type="latent", **call).images
        torch.testing.assert_close(theirs.reshape(2, -1), pack(mine).reshape(2, -1), rtol=1e-4, atol=1e-4)


def test_a_mixture_is_not_exported(folders, prompts_file, tmp_path, capsys):
    run = train(tmp_path, "run", "--max-train-steps 1 --policy gmflow", folders["flux"], prompts_file)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "--policy gmflow has no pipeline" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
