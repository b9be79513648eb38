"""Optimizer state that waits on the host: the same bits as without, where each tensor lies, and who refuses it.

Where there is no GPU, the host stands in for one (the state is copied all the same), or torch's fake tensors do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import forked
import pytest
import tiny
import torch
from launched import Plan, launch
from tiny_runs import stopped_at
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from train_t2i import build
from train_t2i.engine import AdamSettings, Engine, Flags, backends, offload
from train_t2i.engine.offload import ALIGNED, SMALLEST, HostMemory, slices
from train_t2i.errors import EXIT_USER

THERE = torch.device("cuda", 0)
# above and below the 4096 elements from which bitsandbytes quantises; "slow" learns at a rate of its own
SHAPES = {"a": (96, 64), "slow.b": (7,), "c": (2, 33, 64), "slow.d": (64, 96), "e": (1,)}
ROLE = "generator"


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def engine_of(
    named: dict[str, nn.Parameter], *, moves: bool, eight_bit: bool = False, precision: str = "no", device: Any = "cpu"
) -> Engine:
    engine = Engine(Flags(precision))
    engine.device = engine.backend.device = torch.device(device)
    settings = AdamSettings(0.1, (0.9, 0.999), 1e-8, 0.01, eight_bit, {"^slow": 0.1}, offload=moves)
    engine.prepare(ROLE, nn.Module(), named, settings)
    return engine


def update(engine: Engine, named: dict[str, nn.Parameter], step: int, *, finite: bool = True) -> None:
    """Two micro-batches, a step, and the average."""
    for part in range(2):
        generator = torch.Generator().manual_seed(2 * step + part)
        loss = sum((torch.randn(p.shape, generator=generator) * p).sum() for p in named.values())
        engine.backward(ROLE, loss * (1.0 if finite or part else float("inf")), last=part == 1)
    assert bool(engine.step(ROLE).skipped) is not finite
    engine.average(ROLE, 0.75)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's memory taken for a device's, and a slice for fewer elements than the parameters have."""
    monkeypatch.setattr(backends, "is_apart", lambda device: True)
    monkeypatch.setattr(offload, "SLICE", 7000)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def moved_parts(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    for state in engine.backend.optimizers[ROLE].state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and not key.startswith("qmap"):
                yield key, value


def all_waits(engine: Engine) -> bool:
    """Whether the state lies in the memory where it waits, and nowhere else."""
    blocks = {block.untyped_storage().data_ptr() for block in engine.backend.offloaded[ROLE].memory.blocks}
    return {value.untyped_storage().data_ptr() for _, value in moved_parts(engine)} == blocks


@pytest.mark.parametrize("first_finite", [True, False], ids=["", "skipped-first"])
@pytest.mark.parametrize(("eight_bit", "precision"), [(False, "no"), (True, "no"), (False, "fp16")])
def test_training_is_equal_bit_for_bit(apart, eight_bit, precision, first_finite):
    """Accumulated, clipped, with skipped updates, on the device (fp32) and by the host; and its checkpoint is the same bytes."""
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    ends = []
    for moves in (False, True):
        named = parameters()
        engine = engine_of(named, moves=moves, eight_bit=eight_bit, precision=precision)
        assert (ROLE in engine.backend.offloaded) is moves
        for step in range(5):
            update(engine, named, step, finite=step != 2 and (first_finite or step > 0))
        ends.append((named, engine.role_state(ROLE)))
        if moves:
            assert all_waits(engine)
            states = engine.backend.optimizers[ROLE].state.values()
            assert len({id(state["qmap1"]) for state in states if "qmap1" in state}) == eight_bit, "all share a table"
            if not eight_bit:
                assert {key for key, _ in moved_parts(engine)} == {"exp_avg", "exp_avg_sq", "ema"}
    (plain, saved), (moved, kept) = ends
    assert same(plain, moved)
    assert (kept.values, kept.scaler) == (saved.values, saved.scaler)
    for mine, theirs in zip(
        (kept.model, kept.optimizer, kept.average), (saved.model, saved.optimizer, saved.average), strict=True
    ):
        assert mine
        assert same(mine, theirs)


@pytest.mark.parametrize("eight_bit", [False, True], ids=["adamw", "eight_bit"])
@pytest.mark.parametrize("moves", [True, False], ids=["on", "off"])
def test_a_checkpoint_goes_on_with_the_flag_and_without(apart, monkeypatch, moves, eight_bit):
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    named, again = parameters(), parameters()
    engine, other = (engine_of(p, moves=on, eight_bit=eight_bit) for p, on in ((named, not moves), (again, moves)))
    for step in range(3):
        update(engine, named, step)
    optimizer, made = other.backend.optimizers[ROLE], []
    with monkeypatch.context() as patch:  # how state is made where there is none yet
        step_of = optimizer.step
        patch.setattr(
            optimizer, "step", lambda: (made.append([len(g["params"]) for g in optimizer.param_groups]), step_of())
        )
        other.load_role(ROLE, engine.role_state(ROLE))
    assert made == [[1, 0]] * len(SHAPES), "a tensor at a time, or loading would be the run's peak"
    assert (ROLE in other.backend.offloaded) is moves
    assert not moves or all_waits(other)
    for step in range(3, 5):
        update(engine, named, step)
        update(other, again, step)
    assert same(named, again)
    with engine.averaged(ROLE), other.averaged(ROLE):
        assert same(named, again)
        assert not same(named, {name: p.detach() for name, p in parameters().items()})
    assert same(engine.role_state(ROLE).average, other.role_state(ROLE).average)


# -- where it lies ---------------------------------------------------------------------------------------------------


class Crossings(TorchDispatchMode):
    """Copies between the host and the device: the keys are whether the host goes on meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.count = {True: 0, False: 0}
        self.unpinned = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        asked = kwargs or {}
        if func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self.count[bool(asked.get("non_blocking", len(args) > 2 and args[2]))] += 1
        if func is torch.ops.aten.empty.memory_format and asked["device"].type == "cpu":
            self.unpinned += not asked.get("pin_memory")
        return func(*args, **asked)


def test_state_is_on_the_device_for_its_slice_of_a_step_alone(monkeypatch):
    monkeypatch.setattr(offload, "SLICE", 7000)
    seen: list[set[str]] = []
    with FakeTensorMode(), Crossings() as crossings:
        named = {name: nn.Parameter(torch.empty(shape, device=THERE)) for name, shape in SHAPES.items()}
        names = {id(parameter): name for name, parameter in named.items()}
        engine = engine_of(named, moves=True, device=THERE)
        optimizer, averages = engine.backend.optimizers[ROLE], []
        step_of = optimizer.step

        def there(average: bool) -> set[str]:
            return {
                names[id(parameter)]
                for parameter, state in optimizer.state.items()
                for key, value in state.items()
                if value.ndim and (key == "ema") is average and value.device == THERE
            }

        def step() -> None:
            seen.append(there(average=False))
            averages.append(there(average=True))
            step_of()

        monkeypatch.setattr(optimizer, "step", step)
        for _ in range(2):
            for parameter in named.values():
                parameter.grad = torch.empty_like(parameter)
            before = dict(crossings.count)
            engine.step(ROLE)
            engine.average(ROLE, 0.5)
            assert not there(average=False)
            assert not there(average=True)
            assert {p.device for p in named.values()} == {THERE}
        assert seen == [set(), set(), set(), {"a"}, {"c", "e", "slow.b"}, {"slow.d"}]
        assert not any(averages)
        assert crossings.count == {True: before[True] + 2 * 3 * len(SHAPES), False: 0}
        assert crossings.unpinned == 0
        with engine.averaged(ROLE):
            pass
        assert crossings.count[False] == 0
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: seen.append({str(device)}))
        with pytest.raises(DataDependentOutputException):  # the number of steps, which comes last
            engine.role_state(ROLE)
    assert seen[-1] == {"cuda:0"}, "the host read what may not have come yet"


def test_slices_and_memory():
    sizes = [3, 4, 5, 20, 1, 1]
    parts = list(slices([torch.empty(n * (offload.SLICE // 10), device="meta") for n in sizes]))
    assert [[tensor.numel() // (offload.SLICE // 10) for tensor in part] for part in parts] == [
        [3, 4],
        [5],
        [20],
        [1, 1],
    ]
    memory = HostMemory(pinned=False)
    made = [
        memory.like(torch.empty(shape, dtype=dtype)) for shape, dtype in (((3, 5), torch.float32), ((7,), torch.uint8))
    ]
    assert [(tensor.shape, tensor.dtype) for tensor in made] == [((3, 5), torch.float32), ((7,), torch.uint8)]
    assert memory.used == [2 * ALIGNED]
    assert memory.like(torch.empty(0, 4)).shape == (0, 4)
    for _ in range(3):
        memory.like(torch.empty(SMALLEST, dtype=torch.uint8))
    memory.like(torch.empty(3 * ALIGNED, dtype=torch.uint8))  # into what the first has left
    assert [block.numel() // SMALLEST for block in memory.blocks] == [1, 1, 2]
    assert memory.used == [5 * ALIGNED, SMALLEST, 2 * SMALLEST]


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_runs_and_their_checkpoints_are_the_same(trainer, apart, monkeypatch):
    """dmdr, two roles; a run stopped and gone on with the flag set the other way."""
    plain = trainer.run("plain", "--batch-size 1 --checkpoint-steps 1")
    moved = trainer.run("moved", "--batch-size 1 --checkpoint-steps 1 --offload-optimizer")
    tiny.assert_same_checkpoint(plain, moved, 2)
    tiny.assert_same_logs(plain, moved)
    for run, more in ((plain, "--offload-optimizer"), (moved, "")):
        stopped_at(run, 1, f"{run.name}-again")
        again = trainer.run(f"{run.name}-again", f"--batch-size 1 --checkpoint-steps 1 --resume-ckpt latest {more}")
        tiny.assert_same_checkpoint(plain, again, 2)
        assert "settings differ" not in (again / "log.txt").read_text()


@pytest.mark.slow
def test_two_processes_train_alike(trainer):
    """Whole copies, and rows of which a process may have none; sft with a moving average, and its sample images."""
    flags = "--batch-size 1 --use-lora-gen --lora-rank 1 --ema-decay 0.5 --sample-steps 2 --checkpoint-steps 1"
    plans = [
        Plan(
            f"{backend}{more}",
            trainer.arguments(f"{backend}{more}", f"{flags} --backend {backend} {more}", "sft"),
            fault,
        )
        for backend in ("ddp", "fsdp2")
        for more, fault in (("", "none"), ("--offload-optimizer", "apart"))
    ]
    for report in launch(trainer.root, 2, plans):
        assert report["codes"] == {plan.name: 0 for plan in plans}
    for backend in ("ddp", "fsdp2"):
        plain, moved = (trainer.root / name for name in (backend, f"{backend}--offload-optimizer"))
        tiny.assert_same_checkpoint(plain, moved, 2)
        tiny.assert_same_logs(plain, moved)
        assert dict(tiny.checkpoint_files(moved, 2))["accelerator_1/ema.safetensors"]
        images = [sorted((run / "samples").rglob("*.png")) for run in (plain, moved)]
        assert images[0]
        assert [file.read_bytes() for file in images[0]] == [file.read_bytes() for file in images[1]]
        assert "nothing to do on a CPU" in (moved / "log.txt").read_text(), (
            "but for this test, which takes it for a GPU"
        )


def test_on_a_cpu_it_does_nothing_and_says_so(trainer):
    run = trainer.run("run", "--max-train-steps 1 --offload-optimizer", "sft")
    assert "--offload-optimizer: nothing to do on a CPU, whose memory is the host's" in (run / "log.txt").read_text()


def test_deepspeed_is_refused_where_the_launcher_asks_for_it(trainer, one_thread_before_a_fork):
    pytest.importorskip("deepspeed")

    def launched(rank: int) -> None:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
        build.build_family = None  # nothing may load

    arguments = trainer.arguments("run", "--offload-optimizer --backend auto")
    for child in forked.train_world(arguments, trainer.root / "out", before=launched):
        assert child.ends(60) == EXIT_USER, child.said()
        assert "--offload-optimizer does not go with --backend zero2" in child.said()
