"""How a verb that writes a folder of shards is shared out: each process of a launch does its own, without a word to the others.

What a shard holds follows from the settings and the data alone, so the files are the same for any number of processes, and
a stopped launch goes on with the same command: finished shards stay.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train_t2i.errors import EXIT_DISK, EXIT_USER, UserError


@dataclass(frozen=True)
class Share:
    """This process among those of the launch."""

    rank: int
    world: int

    @staticmethod
    def of_environment() -> Share:
        return Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def takes(self, shard: int) -> bool:
        return shard % self.world == self.rank


@contextlib.contextmanager
def locked(folder: Path, share: Share) -> Iterator[None]:
    """One launch a folder: its main process holds the lock.

    The others of a launch that is refused may get to work before they are ended: they harm nobody's files.
    """
    from train_t2i import storage
    from train_t2i.mapped import sweep

    storage.make_folder(folder)
    sweep(folder)
    if not share.is_main:
        yield
        return
    try:
        held = storage.take_lock(folder / ".lock")
    except UserError as error:
        raise UserError(error.message, "wait for it or stop it, or choose another --out", error.exit_code) from None
    try:
        yield
    finally:
        storage.release_lock(held)


def cannot_be_written(out: str | Path, error: OSError) -> UserError:
    """What a user is told of a folder that takes no files, or no more of them."""
    from train_t2i.storage import FULL

    full = error.errno in FULL
    hint = "make room and run the same command" if full else "choose another folder"
    told = f"--out {out}: cannot be written ({error.strerror or error})"
    return UserError(told, hint, EXIT_DISK if full else EXIT_USER)
