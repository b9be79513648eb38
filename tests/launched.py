"""Several processes on the CPU (gloo, by torchrun): one launch, several runs of ``train`` in it.

Run as a program this file is what each of the processes executes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Plan:
    """A run of the launch, and what is done to it (FAULTS)."""

    name: str
    arguments: list[str]
    fault: str = "none"


def launch(root: Path, processes: int, plans: list[Plan]) -> list[dict[str, Any]]:
    """What each process reports: exit codes by name of the run, files written, world and communication backend."""
    file = root / "plan.json"
    file.write_text(json.dumps({"root": str(root), "runs": [[p.name, p.arguments, p.fault] for p in plans]}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, __file__, str(file)], env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(processes)]


# -- what each process does ------------------------------------------------------------------------------------------


def watch_writes(root: str, found: list[str]) -> None:
    """Keep everything that this process makes, opens for writing, moves or removes below ``root``."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, str | os.PathLike) and str(path).startswith(root):
                found.append(f"open {path}")
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(arguments[0]).startswith(root):
            found.append(f"{event} {arguments[0]}")

    sys.addaudithook(hook)


@contextmanager
def _not_finite(rank: int) -> Iterator[None]:
    """The loss of process 1 is not a number in its first update."""
    from train_t2i import losses

    updates, dmd = iter(range(100)), losses.dmd

    def loss(*arguments: Any) -> Any:
        bad = (rank, next(updates)) == (1, 0)
        return dmd(*arguments) * (float("nan") if bad else 1.0)

    with mock.patch.object(losses, "dmd", loss):
        yield


@contextmanager
def _signal(rank: int) -> Iterator[None]:
    """SIGTERM to process 1 alone, in the middle of a step."""
    from train_t2i.log import RunLog

    flush: Callable[..., None] = RunLog.end_tick

    def interrupted(self: RunLog, tick: int, *rest: Any) -> None:
        flush(self, tick, *rest)
        if rank == 1 and tick == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(RunLog, "end_tick", interrupted):
        yield


@contextmanager
def _no_common_disk(rank: int) -> Iterator[None]:
    """Process 1 does not see the run's checkpoints."""
    from train_t2i import prepare

    if rank != 1:
        yield
        return
    with mock.patch.object(prepare, "find_checkpoint", return_value=None):
        yield


@contextmanager
def _saved_again(rank: int) -> Iterator[None]:
    """Nothing is trained: what was loaded is saved once more, beside the run, as NAME-again."""
    from train_t2i import resume, train
    from train_t2i.checkpoint import RunFolder

    def loop(run: Any) -> int:
        run.folder = RunFolder(run.folder.root.with_name(f"{run.folder.root.name}-again"))
        resume.save(run)
        return 0

    with mock.patch.object(train, "loop", loop):
        yield


@contextmanager
def _counted(rank: int) -> Iterator[None]:
    """Bytes given to collectives in the second step of a run whose steps are two ticks; see TRAFFIC."""
    from train_t2i import train
    from train_t2i.log import RunLog

    flush: Callable[..., None] = RunLog.end_tick
    loop = train.loop

    def counted(self: RunLog, tick: int, *rest: Any) -> None:
        flush(self, tick, *rest)
        TRAFFIC.on = tick in (2, 3)

    def sized(run: Any) -> int:
        def count(parameters: Any) -> int:
            return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)

        networks = run.networks
        TRAFFIC.begin({name: count(net.parameters()) for name, net in networks.modules.items()})
        TRAFFIC.sizes |= {role: count(networks.parameters(role)) for role in run.method.trains}
        return loop(run)

    with mock.patch.object(RunLog, "end_tick", counted), mock.patch.object(train, "loop", sized):
        yield


@contextmanager
def _apart(rank: int) -> Iterator[None]:
    """The host's memory is taken for a device's, from which optimizer state can be moved away; a slice is small."""
    from train_t2i.engine import backends, offload

    with mock.patch.object(backends, "is_apart", return_value=True), mock.patch.object(offload, "SLICE", 2_000):
        yield


@contextmanager
def _kept_on_host(rank: int) -> Iterator[None]:
    """What networks keep goes to the host, however small; a run of which nothing does fails."""
    from train_t2i import on_host

    went: list[Any] = []
    to_host = on_host.to_host

    def counted() -> Any:
        went.append(to_host())
        return went[-1]

    with mock.patch.object(on_host, "SMALL_BYTES", 0), mock.patch.object(on_host, "to_host", counted):
        yield
    assert went


def _asked(**environ: str) -> Callable[[int], Any]:
    """What accelerate's launcher would have set."""

    @contextmanager
    def fault(rank: int) -> Iterator[None]:
        with mock.patch.dict(os.environ, environ):
            yield

    return fault


def _zero_file(stage: int) -> Callable[[int], Any]:
    file = Path(__file__).parents[1] / "config" / f"zero_stage{stage}_config.json"
    return _asked(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))


@contextmanager
def _compiled(rank: int) -> Iterator[None]:
    """Blocks pass the part of torch's compiler that decides when to compile, which takes seconds; to compile after the third tick is an error.

    A step is two ticks, and what is sampled after it is drawn with another graph than its update.
    """
    import torch
    from torch._dynamo.utils import counters

    from train_t2i.compiled import compile_blocks
    from train_t2i.log import RunLog
    from train_t2i.networks import Networks

    end_tick: Callable[..., None] = RunLog.end_tick
    ticks = iter(range(1, 1000))

    def ended(self: RunLog, *arguments: Any) -> None:
        end_tick(self, *arguments)
        torch._dynamo.config.error_on_recompile = next(ticks) > 2

    def compiled(self: Networks) -> None:
        compile_blocks(self.modules.values(), self.family.block_names, "eager")

    torch._dynamo.reset()
    counters.clear()
    with (
        torch._dynamo.config.patch(error_on_recompile=False),
        mock.patch.object(RunLog, "end_tick", ended),
        mock.patch.object(Networks, "compile", compiled),
    ):
        yield
    assert counters["stats"]["unique_graphs"]


class Traffic:
    """What goes through torch.distributed, by the whole tensor of each call: what is reduced, and what is gathered."""

    REDUCES = ("all_reduce", "reduce", "reduce_scatter_single", "reduce_scatter_tensor")
    GATHERS = ("all_gather_single", "all_gather_into_tensor")

    def __init__(self) -> None:
        self.on = False
        self.begin({})

    def begin(self, sizes: dict[str, int]) -> None:
        self.sizes, self.bytes = sizes, {"reduced": 0, "gathered": 0}

    def watch(self) -> None:
        """To be called before any library keeps the functions."""
        import torch
        import torch.distributed as dist

        def wrapped(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
            def counting(*arguments: Any, **named: Any) -> Any:
                if self.on:
                    tensors = [a for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor)]
                    self.bytes[kind] += max(tensor.nbytes for tensor in tensors)
                return call(*arguments, **named)

            return counting

        for kind, names in (("reduced", self.REDUCES), ("gathered", self.GATHERS)):
            for name in names:
                setattr(dist, name, wrapped(getattr(dist, name), kind))


TRAFFIC = Traffic()


@contextmanager
def _none(rank: int) -> Iterator[None]:
    yield


FAULTS = {
    "none": _none,
    "not_finite": _not_finite,
    "signal": _signal,
    "no_common_disk": _no_common_disk,
    "saved_again": _saved_again,
    "counted": _counted,
    "apart": _apart,
    "compiled": _compiled,
    "kept_on_host": _kept_on_host,
    "zero_stage2_file": _zero_file(2),
    "zero_stage3_file": _zero_file(3),
    "fsdp_flags": _asked(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="1",
        FSDP_SHARDING_STRATEGY="FULL_SHARD",
        FSDP_TRANSFORMER_CLS_TO_WRAP="BasicTransformerBlock,ResnetBlock2D",
    ),
}


def child(plan_file: str) -> None:
    import torch

    torch.set_num_threads(1)
    TRAFFIC.watch()
    from train_t2i.__main__ import main
    from train_t2i.engine import Engine, PartialState

    plan: dict[str, Any] = json.loads(Path(plan_file).read_text())
    rank, written, codes, traffic = int(os.environ["RANK"]), [], {}, {}
    Engine.close = lambda self: None  # type: ignore[method-assign]  # the processes stay together for the next run
    if rank == 1:
        watch_writes(plan["root"], written)
    for name, arguments, fault in plan["runs"]:
        with FAULTS[fault](rank):
            codes[name] = main(arguments)
        if fault == "counted":
            traffic[name] = {"sizes": TRAFFIC.sizes, "bytes": TRAFFIC.bytes}
        PartialState().wait_for_everyone()  # the next run may read what the first process wrote
    state = PartialState()
    result = {"codes": codes, "written": written, "world": state.num_processes, "backend": state.backend}
    result["traffic"] = traffic
    Path(f"{plan_file}.{rank}").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    child(sys.argv[1])
