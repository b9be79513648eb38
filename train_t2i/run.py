"""What a run is made of: everything that the loop touches, its counters, and the request to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import FrameType

from train_t2i.checkpoint import RunFolder
from train_t2i.config import Settings
from train_t2i.engine import Engine
from train_t2i.feed import Feed
from train_t2i.guard import Reading
from train_t2i.log import RunLog
from train_t2i.methods import Method
from train_t2i.methods.base import Clock
from train_t2i.monitor import Monitor
from train_t2i.networks import Networks
from train_t2i.sheet import SampleSheet
from train_t2i.watchdog import Watchdog

REPEAT_SECONDS = 0.3  # `timeout` and some launchers send one signal twice: to the process and to its group


@dataclass
class State:
    """The counters of a run; with the settings they determine everything that comes next."""

    clock: Clock = field(default_factory=Clock)
    samples_seen: int = 0
    first_step: int = 0  # of this stage: the rates are a function of the steps since
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)  # a role
    readings: list[Reading] = field(default_factory=list)  # of this stage, by step

    def advance(self, stepped: bool, samples: int) -> None:
        old = self.clock
        within = 0 if stepped else old.tick_in_step + 1
        self.clock = replace(old, tick=old.tick + 1, step=old.step + stepped, tick_in_step=within)
        self.samples_seen += samples

    def scale_rewards(self, factor: float) -> None:
        self.clock = replace(self.clock, reward_scale=self.clock.reward_scale * factor)


class StopRequest:
    """SIGTERM, Ctrl-C and a terminal that hangs up ask for a stop at the next step boundary; a second one leaves at once."""

    def __init__(self) -> None:
        self.asked, self._asked_at = False, 0.0

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGTERM, signal.SIGINT]
        # nohup's run outlives its terminal, unless torch's launcher is between: that stops for a hang-up and passes it on
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN or "TORCHELASTIC_RUN_ID" in os.environ:
            numbers.append(signal.SIGHUP)
        self._before = {n: signal.signal(n, self._on_signal) for n in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._asked_at > REPEAT_SECONDS:
            os._exit(128 + number)
        if not self.asked:
            self.asked, self._asked_at = True, now


class Saver:
    """Writes one checkpoint at a time beside the loop; an error comes back with ``wait``."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        self.wait()
        self._pending = self._thread.submit(write)

    @property
    def failed(self) -> bool:
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until everything is on the disk.  Raises the error of a write that failed, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let a write that is under way end, since the run's lock is about to be given back."""
        self._thread.shutdown()


@dataclass
class Run:
    """Everything the loop touches."""

    settings: Settings
    folder: RunFolder
    engine: Engine
    networks: Networks
    method: Method
    feed: Feed
    log: RunLog
    sheet: SampleSheet
    monitor: Monitor | None
    state: State
    stop: StopRequest
    watch: Watchdog
    saver: Saver = field(default_factory=Saver)
    saved_at: float = field(default_factory=time.monotonic)

    def begin(self, phase: str) -> None:
        """Tell the watchdog that a phase of the loop begins: tick, sample, save."""
        self.watch.beat(phase, self.state.clock.tick, self.state.clock.step)
