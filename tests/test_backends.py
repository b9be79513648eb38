"""Every backend against one process with the same global batch: losses, weights, optimizer states, resume, exports.

fp32.  Adam's epsilon is large enough to carry rounding as it is, instead of turning the sign of a gradient of rounding
errors into a whole step; what is apart is measured against how far the run has moved.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import tiny_runs
import torch
from flow_models import save_flow
from launched import Plan, launch
from safetensors.torch import load_file
from test_distributed import close_logs
from tiny_runs import stopped_at
from trainer import Trainer, flags_of

from train_t2i.checkpoint import RunFolder
from train_t2i.errors import EXIT_GAMED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

BACKENDS = {"ddp": 4, "fsdp2": 2, "zero2": 2, "zero3": 2}  # and how many processes
APART = 2e-3  # of the largest movement
ROWS = 4
COMMON = "--max-train-steps 2 --checkpoint-steps 1 --adam-epsilon 1e-2 --sample-steps 2 --lr-warmup-steps 2 --max-grad-norm 0.05"
CASES = {
    # name: (method, flags, micro-batches of several processes)
    "shared": ("dmdr", "--use-lora-gen --sample-num-steps 2 --cold-start-iter 1 {rewards} --gradient-checkpointing", 1),
    "paired": ("dmdr", "--sample-num-steps 2", 2),
    "paired_lora": ("dmdr", "--use-lora-gen --layout paired_lora", 1),
    "separate": ("dmdr", "--layout separate --lora-rank 32 --gradient-checkpointing", 1),
    "eight_bit": ("sft", "--use-8bit-adam", 1),
    # an optimizer that moves by the clipped gradient itself: g / (sqrt(v) + 1) is g where gradients are small
    "clipped": (
        "sft",
        "--learning-rate-gen 1 --adam-beta1 0 --adam-epsilon 1 --adam-weight-decay 0 --lr-warmup-steps 0 "
        "--max-grad-norm 1e-3",
        1,
    ),
    "flux": (
        "dmdr",
        "--pretrained-model {flux} --text-length 24 --use-lora-gen --sample-num-steps 2 --sample-type ode",
        1,
    ),
    "qwen_image": (
        "dmdr",
        "--pretrained-model {qwen_image} --use-lora-gen --sample-num-steps 2 --cfg-r 3 --gradient-checkpointing",
        1,
    ),
    # rows of one step, where every process makes three calls if calls need all
    "direct": (
        "direct",
        "--use-lora-gen --lora-rank 2 --max-row-steps 3 --sample-type ode --gradient-checkpointing",
        2,
    ),
    "arcflow": (
        "arcflow",
        "--pretrained-model {flux} --text-length 24 --use-lora-gen --lora-rank 2 --sample-num-steps 2 --shift 3.2 "
        "--num-components 3 --mixing-steps 1 --distill-cfg 1 --ema-start 0 --teacher-cfg 1 --teacher-num-steps 2",
        1,
    ),
    # colours are followed so fast that what the tower sees falls at the second step: rewards are scaled before the third
    "watched": (
        "dmdr",
        "--sample-num-steps 2 --cold-start-iter 0 --extra-rewards 30*shapes.bait:saturation --extra-reward-margin 2 "
        "--dmd-weight 1e-3 --learning-rate-gen 5e-2 --adam-epsilon 1e-4 --lr-warmup-steps 0 --max-grad-norm 1 "
        "--monitor-rewards {watched} --monitor-seeds 3 --sample-steps 1 --guard-reward-drop 0 --guard-diversity-drop 0 "
        "--reward-guard scale --max-train-steps 3",
        1,
    ),
}
LAUNCHER = {"fsdp2": "fsdp_flags", "zero2": "zero_stage2_file", "zero3": "zero_stage3_file"}
LOADED = ("paired", "shared")  # all weights, a LoRA
RESUMED = ("shared", "eight_bit", "arcflow", "watched")
CODES = {"gamed": EXIT_GAMED}  # of runs that do not end well


class World:
    """The runs of one backend in a launch, and the same runs in this process."""

    def __init__(self, root: Path, backend: str, flags: dict[str, str], towers: dict[str, Path]) -> None:
        self.root, self.backend, self.processes = root, backend, BACKENDS[backend]
        self.trainer = Trainer(root, flags, lambda: ("", ""))
        self.rewards = f"--clip-reward-model {towers['clip']} --reward-margin 2"
        self.watched = f"clip={towers['clip']}"
        self.models = {name: save_flow(root / name, name) for name in ("flux", "qwen_image")}

    def arguments(self, case: str, name: str, processes: int, more: str = "") -> list[str]:
        method, flags, micro = CASES[case]
        micro = micro if processes * micro <= ROWS and processes > 1 else 1
        batch = f"--batch-size {ROWS // (processes * micro)} --gradient-accumulation-steps {micro}"
        backend = f"--backend {self.backend}" if processes > 1 else ""
        flags = f"{COMMON} {flags.format(rewards=self.rewards, watched=self.watched, **self.models)} {batch} {backend} {more}"
        return self.trainer.arguments(name, flags, method)

    def alone(self, case: str) -> Path:
        """The run in this one process, made once."""
        from train_t2i.__main__ import main

        name = f"{case}-alone"
        if not (self.root / name).exists():
            assert main(self.arguments(case, name, 1)) == 0
        return self.root / name

    def plans(self) -> list[Plan]:
        """Every case; one stopped and gone on with; one that one process began; a checkpoint of one process saved again."""
        plans = [Plan(case, self.arguments(case, case, self.processes)) for case in CASES]
        for case in RESUMED:
            name = f"{case}-resumed"
            plans.append(Plan(f"{name}-1", self.arguments(case, name, self.processes, "--max-train-steps 1")))
            plans.append(Plan(name, self.arguments(case, name, self.processes, "--auto-resume")))
        plans.append(Plan("gamed", self.arguments("watched", "gamed", self.processes, "--reward-guard stop")))
        for case in ("shared", "eight_bit"):
            moved = stopped_at(self.alone(case), 1, f"{case}-moved")
            plans.append(Plan(moved.name, [*self.arguments(case, moved.name, 1), *self.moved_flags()]))
        for case in LOADED:
            copy = stopped_at(self.alone(case), 1, f"{case}-loaded")
            plans.append(Plan(copy.name, [*self.arguments(case, copy.name, 1), *self.moved_flags()], "saved_again"))
        if self.backend in LAUNCHER:
            asked = [*self.arguments("clipped", "asked", self.processes), "--backend", "auto"]
            plans.append(Plan("asked", asked, LAUNCHER[self.backend]))
        plans.append(Plan("skips", self.arguments("paired", "skips", self.processes), "not_finite"))
        return plans

    def moved_flags(self) -> list[str]:
        return ["--auto-resume", "--backend", self.backend]


@pytest.fixture(scope="module", params=BACKENDS)
def world(request, tmp_path_factory, sdxl_folder, tiny_vae_folder, prompts_file, images_table, pairs_folder, towers):
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.mktemp(request.param)
    flags = flags_of(root, sdxl_folder, tiny_vae_folder, prompts_file, images_table, pairs_folder)
    made = World(root, request.param, flags, towers)
    plans = made.plans()
    reports = launch(root, made.processes, plans)
    assert [report["codes"] for report in reports] == [
        {plan.name: CODES.get(plan.name, 0) for plan in plans}
    ] * made.processes
    return made


def assert_close(run: Path, other: Path, step: int = 2, bound: float = APART) -> None:
    """Weights and optimizer states of two runs, by how far ``other`` moved in its last step."""
    files, expected = dict(tiny.checkpoint_files(run, step)), dict(tiny.checkpoint_files(other, step))
    before = dict(tiny.checkpoint_files(other, step - 1))
    assert files.keys() == expected.keys()
    for name, tensors in expected.items():
        if name.endswith(".json"):
            assert files[name] == tensors
            continue
        assert files[name].keys() == tensors.keys()
        moved = max(float((tensors[key] - before[name][key]).abs().max()) for key in tensors)
        apart = max(float((tensors[key] - files[name][key]).abs().max()) for key in tensors)
        assert moved > 0
        assert apart < bound * moved, name


@pytest.mark.parametrize("case", [case for case in CASES if case != "eight_bit"])
def test_it_trains_as_one_process_does(world, case):
    assert_close(world.root / case, world.alone(case))
    for role in ("generator", "guidance") if CASES[case][0] == "dmdr" else ("generator",):
        close_logs(tiny.log_lines(world.root / case, role), tiny.log_lines(world.alone(case), role))


def test_the_clip_and_the_warm_up_act(world):
    lines = tiny.log_lines(world.root / "paired")
    assert all(line["grad_norm"] > 0.05 for line in lines)
    assert [line["lr"] for line in lines] == [5e-4, 1e-3]


def test_a_step_is_no_longer_than_the_clip(world):
    """Whatever the backend says of its norm: what is measured is how far the weights went."""
    weights = "accelerator_1/model.safetensors"
    before, after = (dict(tiny.checkpoint_files(world.root / "clipped", step))[weights] for step in (1, 2))
    moved = torch.stack([(after[key] - before[key]).double().norm() for key in after]).norm()
    assert tiny.log_lines(world.root / "clipped")[1]["grad_norm"] > 1e-2
    assert 0.9e-3 < moved < 1.01e-3


def test_a_launchers_own_settings_make_the_same_run(world):
    """A DeepSpeed file or FSDP's flags, with --backend auto."""
    if world.backend not in LAUNCHER:
        pytest.skip("accelerate has no settings of plain data parallelism")
    record = torch.load(tiny_runs.record(world.root / "asked", 2), weights_only=True)
    assert record["backend"] == world.backend
    assert_close(world.root / "asked", world.alone("clipped"))


def test_an_export_is_the_masters_in_half_the_bits(world, tmp_path):
    """A checkpoint has one form, whatever made it."""
    from train_t2i.__main__ import main

    run, out = world.root / "clipped", tmp_path / "p"
    assert main(["export", str(run), "--out", str(out), "--dtype", "bf16", "--max-shard-size", "300KB"]) == 0
    exported = {key: t for file in (out / "unet").glob("*.safetensors") for key, t in load_file(file).items()}
    masters = dict(tiny.checkpoint_files(run, 2))["accelerator_1/model.safetensors"]
    assert exported.keys() == masters.keys()
    assert all(torch.equal(exported[key], masters[key].bfloat16()) for key in masters)


def test_an_eight_bit_optimizer_trains_as_on_one_process(world):
    """Its blocks of 256 elements lie elsewhere in shares than in whole tensors, so that states round differently."""
    weights = "accelerator_1/model.safetensors"
    mine, alone = (
        dict(tiny.checkpoint_files(run, 2))[weights] for run in (world.root / "eight_bit", world.alone("eight_bit"))
    )
    start = dict(tiny.checkpoint_files(world.alone("eight_bit"), 1))[weights]
    moved = max(float((alone[key] - start[key]).abs().max()) for key in alone)
    assert max(float((alone[key] - mine[key]).abs().max()) for key in alone) < 0.1 * moved
    state = dict(tiny.checkpoint_files(world.root / "eight_bit", 2))["accelerator_1/optimizer.safetensors"]
    assert torch.uint8 in {tensor.dtype for tensor in state.values()}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_same_bit_for_bit(world, case):
    tiny.assert_same_checkpoint(world.root / case, world.root / f"{case}-resumed", 2)
    tiny.assert_same_logs(world.root / case, world.root / f"{case}-resumed")


def test_what_is_watched_is_read_and_judged_as_by_one_process(world):
    """Readings and the guard's decisions, whatever is shared out; a stop is one on all processes (their exit codes)."""
    run, alone, resumed = (
        tiny.log_lines(folder, "monitor")
        for folder in (world.root / "watched", world.alone("watched"), world.root / "watched-resumed")
    )
    close_logs(run, alone)
    assert [line["guard_scale"] for line in run] == [1, 1, 1, 0.5]
    assert run == resumed  # gone on with at step 1: what is judged at step 2 was read before
    tiny.assert_same_checkpoint(world.root / "watched", world.root / "watched-resumed", 3)
    assert RunFolder(world.root / "gamed").steps()[0] == 2


def test_a_run_of_one_process_goes_on_here(world):
    """The global batch is kept: four rows, whatever the processes."""
    assert_close(world.root / "shared-moved", world.alone("shared"))
    said = (world.root / "shared-moved" / "log.txt").read_text()
    assert f"made by 1 processes, now {world.processes}: the global batch of 4 is kept" in said
    mine, alone = (
        dict(tiny.checkpoint_files(run, 2)) for run in (world.root / "eight_bit-moved", world.alone("eight_bit"))
    )
    for key, tensor in alone["accelerator_1/model.safetensors"].items():
        torch.testing.assert_close(mine["accelerator_1/model.safetensors"][key], tensor, rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", ["shared", "eight_bit"])
def test_a_run_of_here_goes_on_in_one_process(world, case):
    from train_t2i.__main__ import main

    back = stopped_at(world.root / case, 1, f"{case}-back")
    assert main([*world.arguments(case, back.name, world.processes), "--auto-resume", "--backend", "auto"]) == 0
    if case == "shared":
        assert_close(back, world.alone(case))
    else:
        mine, alone = (dict(tiny.checkpoint_files(run, 2)) for run in (back, world.alone(case)))
        for key, tensor in alone["accelerator_1/model.safetensors"].items():
            torch.testing.assert_close(mine["accelerator_1/model.safetensors"][key], tensor, rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", LOADED)
def test_what_is_loaded_is_what_is_saved(world, case):
    """Weights, optimizer states and exports of a checkpoint of one process, through this backend and out again."""
    tiny.assert_same_checkpoint(world.alone(case), world.root / f"{case}-loaded-again", 1)


@pytest.mark.parametrize(
    ("case", "to"), [("paired", "pipeline"), ("paired", "merged"), ("shared", "lora"), ("shared", "kohya")]
)
def test_what_is_exported_is_the_same_files(world, tmp_path, case, to):
    """To the last byte, headers and their digests included: those of the one process.  A card and its images tell of a run."""
    from train_t2i.__main__ import main

    for name, run in (("alone", world.alone(case)), ("again", world.root / f"{case}-loaded-again")):
        assert main(["export", str(run), "--step", "1", "--to", to, "--out", str(tmp_path / name)]) == 0
    found = [file.relative_to(tmp_path / "alone") for file in (tmp_path / "alone").rglob("*") if file.is_file()]
    files = [file for file in found if file.parts[0] not in ("README.md", "images")]
    assert any(file.suffix == ".safetensors" for file in files)
    assert all((tmp_path / "alone" / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_exports_are_peft_adapters_with_the_same_keys(world):
    for run in (world.root / "shared", world.alone("shared")):
        for part in ("lora_gen", "lora_gui"):
            folder = run / "checkpoints" / part / "step-2"
            assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    mine, alone = (
        load_file(run / "checkpoints/lora_gen/step-2/adapter_model.safetensors")
        for run in (world.root / "shared", world.alone("shared"))
    )
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in alone.items()}


def test_one_process_that_is_not_finite_makes_all_skip(world):
    run = world.root / "skips"
    assert [line["skipped"] for line in tiny.log_lines(run)] == [1, 0]
    files = [dict(tiny.checkpoint_files(run, step)) for step in (1, 2)]
    first, second = (each["accelerator_1/optimizer.safetensors"].values() for each in files)
    assert not any(moment.any() for moment in first)  # nothing was stepped
    assert any(moment.any() for moment in second)
