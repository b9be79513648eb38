"""The rows of a benchmark: what differs between them, and a fresh process, or several, for each.

Whatever becomes of a row is its result: the figures, or in one line why there are none.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from train_t2i.config import LAYOUTS
from train_t2i.errors import UserError
from train_t2i.plan import MODELS

SCHEDULES = ("ours", "published")
CHECKPOINTING = {"off": False, "on": True} | {word: word for word in ("decoder+rewards", "networks", "host")}
ENDING_S = 10  # that a process has to end by itself
WITHOUT_FIGURES = ("refused", "out_of_memory", "failed")


@dataclass(frozen=True)
class Row:
    """One combination.  ``model`` is a published one, whose weights are random, or a pipeline folder."""

    model: str
    layout: str = "shared"
    backend: str = "ddp"
    mixed_precision: str = "no"
    checkpointing: bool | str = False
    compile: str = "off"
    schedule: str = "ours"

    @property
    def is_random(self) -> bool:
        return self.model in MODELS

    def told(self) -> dict[str, Any]:
        return {
            "model": self.model, "layout": self.layout, "backend": self.backend, "mixed_precision": self.mixed_precision,
            "gradient_checkpointing": self.checkpointing, "compile": self.compile, "schedule": self.schedule,
        }  # fmt: skip


def chosen(flag: str, given: str, known: Sequence[str]) -> list[str]:
    """A comma list.  Raises UserError for a word that is not known."""
    words = given.split(",")
    if unknown := sorted(set(words) - set(known)):
        raise UserError(f"{flag} {','.join(unknown)}: unknown", f"known: {', '.join(known)}")
    return words


def combinations(config: Any) -> list[Row]:
    """All rows that the flags ask for, in their order.  Raises UserError."""
    models = config.models.split(",") if config.models else [config.pretrained_model]
    axes = (
        models,
        chosen("--layouts", config.layouts, tuple(LAYOUTS)),
        chosen("--backends", config.backends, ("ddp", "fsdp2", "zero2", "zero3")),
        chosen("--mixed-precision", config.mixed_precision, ("no", "fp16", "bf16")),
        [CHECKPOINTING[word] for word in chosen("--checkpointing", config.checkpointing, tuple(CHECKPOINTING))],
        chosen("--compile", config.compile, ("off", "blocks")),
        chosen("--schedules", config.schedules, SCHEDULES),
    )
    return [Row(*combination) for combination in itertools.product(*axes)]


def told(config: Any, row: Row) -> dict[str, Any]:
    """Everything that decides a row's figures but the machine: two rows that say the same are one."""
    reward_models = [m for m in (config.clip_reward_model, config.hpsv2_reward_model) if m is not None]
    if config.random_rewards:
        reward_models = ["random", "random"]
    return row.told() | {
        "num_processes": config.num_processes, "batch_size": config.batch_size, "resolution": config.resolution,
        "sample_num_steps": config.sample_num_steps, "ratio_update": config.ratio_update, "rewards": len(reward_models),
        "reward_models": reward_models, "tiny_vae": config.tiny_vae, "lora_rank": config.lora_rank, "steps": config.steps,
    }  # fmt: skip


def row_words(row: dict[str, Any]) -> str:
    """A row in a few words: those of the comma lists."""
    named = [Path(row["model"]).name, row["layout"], row["backend"], row["mixed_precision"]]
    way = row["gradient_checkpointing"]
    named.append(f"checkpointed ({way})" if isinstance(way, str) else "checkpointed" if way else "not checkpointed")
    named += ["compiled"] if row["compile"] != "off" else []
    return " ".join(named + (["published"] if row["schedule"] == "published" else []))


def still_to_measure(
    config: Any, wanted: Sequence[Row], kept: Sequence[dict[str, Any]]
) -> tuple[list[Row], list[dict[str, Any]], list[dict[str, Any]]]:
    """(the wanted rows whose figures ``kept`` lacks, the kept rows without what these have been before, those skipped)."""
    left, others, skipped = [], [*kept], []
    for row in wanted:
        settings = told(config, row)
        same = [other for other in others if all(other.get(key) == value for key, value in settings.items())]
        figures = [other for other in same if other.keys().isdisjoint(WITHOUT_FIGURES)]
        if figures:
            skipped.append(figures[-1])
        else:
            left.append(row)
            others = [other for other in others if other not in same]
    return left, others, skipped


def fresh(call: Callable[..., Any], given: Sequence[Any], processes: int, limit_s: float) -> dict[str, Any]:
    """What ``call(*given)`` returns in the first of so many new processes, or why it returned nothing.

    All of them are gone afterwards.  ``limit_s``: 0 waits for ever.
    """
    from torch.distributed.elastic.utils.distributed import get_free_port

    context = get_context("spawn")  # so that memory, and its peak, are the row's own
    receiver, sender = context.Pipe(duplex=False)
    port = get_free_port()
    started = [
        context.Process(target=_child, args=(rank, processes, port, call, given, sender if rank == 0 else None))
        for rank in range(processes)
    ]
    end = time.monotonic() + limit_s if limit_s else float("inf")
    for process in started:
        process.start()
    sender.close()
    try:
        while not receiver.poll(0.1):
            if time.monotonic() > end:
                return {"failed": f"not done within {limit_s:g} s"}
            if dead := [p.exitcode for p in started if p.exitcode]:
                return {"failed": f"a process was ended by signal {-dead[0]}" if dead[0] < 0 else "a process ended"}
        made = receiver.recv()
        for process in started:
            process.join(ENDING_S)
        return made
    except EOFError:
        return {"failed": "its process ended before it had measured"}
    finally:
        for process in started:
            process.kill()
            process.join()


def _child(
    rank: int, processes: int, port: int, call: Callable[..., Any], given: Sequence[Any], sender: Connection | None
) -> None:
    if processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        import torch

        if not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
    made = attempt(call, given)
    if sender is not None:
        sender.send(made)
        sender.close()
    elif not made.keys().isdisjoint(WITHOUT_FIGURES):
        raise SystemExit(1)  # the others wait for this one


def attempt(call: Callable[..., Any], given: Sequence[Any]) -> dict[str, Any]:
    """The figures, or one line that says why there are none."""
    import torch

    try:
        return call(*given)
    except UserError as error:
        return {"refused": str(error)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"out_of_memory": str(error).splitlines()[0] if str(error) else "host memory"}
    except Exception as error:  # a row's failure is its result, and the next row is measured
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
