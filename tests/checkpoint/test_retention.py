"""Retention never takes the last valid checkpoint: random histories of saves, damage, prunes and crashes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from saved import assert_holds, files_of, save

from train_t2i import storage
from train_t2i.checkpoint import RunFolder


class Crash(BaseException):
    """The process ends here: no handler of an error runs."""


def crash_at(point: int, work: Callable[[], object]) -> bool:
    """Do ``work`` up to its change of the disk number ``point``; whether it was cut short."""
    left = point

    def before(operation: str, path: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if operation == "write":
                path.write_bytes(b"half of it")
            raise Crash

    with mock.patch.object(storage, "before", before):
        try:
            work()
        except Crash:
            return True
    return False


POINTS = st.integers(1, 70)  # a save of these checkpoints changes the disk about 35 times
KEEPS = st.integers(1, 3)


class Histories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="retention-"))
        self.run, self.step, self.best = RunFolder(self.root / "run"), 0, 0  # best: newest step that must be loadable

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def newest_valid(self) -> int:
        return next((step for step in self.run.steps() if not self.run.damage(self.run.record(step))), 0)

    @rule()
    def save(self) -> None:
        self.step += 1
        save(self.run, self.step)
        self.best = self.step

    @rule(keep=KEEPS)
    def save_and_prune(self, keep: int) -> None:
        self.save()
        self.run.prune(keep)
        assert self.run.steps()[0] == self.step
        assert len(self.run.steps()) <= keep

    @rule(point=POINTS)
    def crash_in_a_save(self, point: int) -> None:
        self.step += 1
        if crash_at(point, lambda: save(self.run, self.step)):
            self.best = max(self.best, self.newest_valid())  # it may have come as far as its record
        else:
            self.best = self.step

    @rule(keep=KEEPS)
    def prune(self, keep: int) -> None:
        self.run.prune(keep)
        assert len(self.run.steps()) <= keep + 1

    @rule(point=POINTS, keep=KEEPS)
    def crash_in_a_prune(self, point: int, keep: int) -> None:
        crash_at(point, lambda: self.run.prune(keep))

    @rule()
    def clean(self) -> None:
        """What a run does when it starts."""
        self.run.clean()
        assert self.run.clean() == []

    @precondition(lambda self: self.run.steps())
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A file of a checkpoint goes bad: most often the newest, which retention would keep."""
        step = data.draw(st.sampled_from(self.run.steps()), label="step")
        files = [
            file for file in files_of(self.run) if file.stem == f"step-{step}" or file.parent.name == f"step-{step}"
        ]
        file = data.draw(st.sampled_from(files), label="file")
        whole = file.read_bytes()
        broken = {"deleted": None, "half": whole[: len(whole) // 2], "flipped": bytes([whole[0] ^ 1]) + whole[1:]}
        content = broken[data.draw(st.sampled_from(sorted(broken)), label="how")]
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        self.best = self.newest_valid()

    @invariant()
    def the_newest_valid_one_is_still_there(self) -> None:
        latest = self.run.latest()
        assert (latest and latest.stem) == (f"step-{self.best}" if self.best else None)
        if latest:
            assert_holds(self.run, latest, self.best)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
