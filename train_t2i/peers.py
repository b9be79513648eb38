"""What torch raises when a process that this one needs is gone, told in one line."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator

import torch.distributed as dist

from train_t2i.errors import EXIT_LOST, UserError

# gloo raises plain RuntimeErrors that begin with a place in its source
GLOO = re.compile(r"gloo/.*?\]\s*(?P<reason>.+)", re.DOTALL)
LOST = re.compile(r"peer|remote|connect|broken pipe|time[sd]? ?out|timeout|abort|unreachable|no route", re.IGNORECASE)
ADDRESS = re.compile(r"\[(?P<host>[0-9a-fA-F.:]+)\]:\d+")


@contextlib.contextmanager
def told_when_lost() -> Iterator[None]:
    """Raises UserError (EXIT_LOST) for an error that means: another process ended, or cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        if (text := str(error)).startswith("DataLoader worker"):
            raise UserError(
                f"a process that reads data was lost: {text.splitlines()[0]}",
                "often memory ran out: fewer --num-workers; then the same command with --auto-resume",
                EXIT_LOST,
            ) from error
        if (reason := _reason(error)) is None:
            raise
        address = ADDRESS.search(reason)
        where = f" at {address['host']}" if address else ""
        rank = os.environ.get("RANK", "0")
        raise UserError(
            f"lost another process{where} (this is rank {rank} on {socket.gethostname()}): {reason}",
            "the first error of the others says why; then the same command with --auto-resume",
            EXIT_LOST,
        ) from error


def _reason(error: RuntimeError) -> str | None:
    """The first sentence of what the transport says (advice and a greeting follow), or None for any other error."""
    text = str(error).strip()
    found = GLOO.search(text)
    if (found is None and not isinstance(error, dist.DistError)) or not LOST.search(text):
        return None  # a mistake in the program keeps its traceback
    lines = (found["reason"] if found else text).splitlines()
    return lines[0].split(". ")[0][:200] if lines else type(error).__name__
