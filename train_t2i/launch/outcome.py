"""How a launch ended: the trainer's own word where there is one, since launchers wrap exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train_t2i.errors import EXIT_DONE, EXIT_PREEMPTED
from train_t2i.launch.watch import Member


class Marker:
    """``OUTPUT_DIR/EXP_NAME/.exit_code`` of the master: written last, after the checkpoint; what a run before left is old."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._before = self._stamp()

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat() if self.path else None
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_ino) if stat else None

    def code(self) -> int | None:
        """What this launch's trainer wrote; none: nothing, it was killed."""
        stamp = self._stamp()
        if self.path is None or stamp is None or stamp == self._before:
            return None
        try:
            return int(self.path.read_text())
        except (OSError, ValueError):
            return None


def exit_code(members: Sequence[Member], failed: Sequence[Member], signal_number: int, said: int | None) -> int:
    """0 when all nodes ended well; else what the trainer said; else the first bad code.

    A stop by a signal is 75 when the trainer said so, or every node did; 128 + N when nobody saved.
    """
    codes = [member.code or 0 for member in members]
    if not any(codes):
        return EXIT_DONE
    if said is not None and said > 0:
        return said
    if signal_number and not failed:
        return EXIT_PREEMPTED if set(codes) <= {EXIT_DONE, EXIT_PREEMPTED} else 128 + signal_number
    return next((member.code for member in failed if member.code), 1)
