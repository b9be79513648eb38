"""Metrics -> JSON lines, log.txt, a progress bar, wandb and tensorboard; sample grids.

Numbers stay on their device until ``write``: a tick that writes nothing does not wait for it.
One line an update in ``loss_logs/loss_gen_log.jsonl`` and ``loss_gui_log.jsonl``, and one a reading of what is watched in
``monitor_log.jsonl``: always the same keys, null where a metric was not computed.  ``seconds_tick`` and ``peak_memory_gib`` (the main process's so far: of its GPU, or its resident
memory on the CPU) are measured; everything else is a function of the run's settings.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from train_t2i import redact
from train_t2i.errors import UserError

LOSS_FILES = {
    "generator": "loss_gen_log.jsonl",
    "guidance": "loss_gui_log.jsonl",
    "monitor": "monitor_log.jsonl",
}
COUNTERS = ("tick", "step", "samples_seen")
SECONDS_BETWEEN_LINES = 30  # where the progress bar has no terminal
GAP_PX = 2  # between the images of a grid
WANDB_CLOUD = {"api.wandb.ai", "api.forge.coreweave.com"}  # two names of one service; a login holds for both


Collected = dict[str, list[Tensor | float]]  # of a tick: metric -> its values, a micro-batch each


class RunLog:
    """Writes on the main process only; ``mean`` averages a dict of numbers over processes (all of them call it).

    ``tick`` is the run's so far.  ``first_tick`` is the first that is written here: an earlier start wrote those before.
    """

    def __init__(
        self,
        root: Path,
        columns: Mapping[Any, Sequence[str]],
        *,
        is_main: bool = True,
        mean: Callable[[dict[str, float]], dict[str, float]] = lambda values: values,
        trackers: Sequence[Tracker] = (),
        total_steps: int = 0,
        first_step: int = 0,
        tick: int = 0,
        first_tick: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.root, self.is_main, self.mean, self.trackers = root, is_main, mean, trackers
        self.columns = {role: (*names, "grad_norm", "lr", "skipped") for role, names in columns.items()}
        self._sums: dict[str, Collected] = {}
        self._unwritten: list[
            tuple[str, dict[str, float], Collected]
        ] = []  # role, counters and what is measured, metrics
        self._latest: dict[str, float] = {}
        self._started = time.perf_counter()
        self._spoke = 0.0
        self._tick, self._first_tick, self._device = tick, first_tick, device
        quiet = not is_main or not sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=quiet, dynamic_ncols=True)
        if is_main:
            (root / "loss_logs").mkdir(parents=True, exist_ok=True)

    def add(self, role: str, metrics: Mapping[str, Tensor | float]) -> None:
        """Collect, over the micro-batches of a tick."""
        for name, value in metrics.items():
            self._sums.setdefault(role, {}).setdefault(name, []).append(value)

    def end_tick(self, tick: int, step: int, samples_seen: int) -> None:
        """What was collected becomes a line a role, to be written later."""
        self._tick = tick
        now = time.perf_counter()
        counted: dict[str, float] = dict(zip(COUNTERS, (tick, step, samples_seen), strict=True))
        counted |= {"seconds_tick": now - self._started, "peak_memory_gib": peak_memory_gib(self._device)}
        self._started = now
        self._unwritten += [(role, counted, collected) for role, collected in self._sums.items()]
        self._sums = {}

    def write(self) -> list[tuple[str, dict[str, Any]]]:
        """Average over micro-batches and processes, and write all that is not written yet: (role, line) in their order.

        All processes call it.  Reads the device once.
        """
        lines, self._unwritten = self._unwritten, []
        local = _means([collected for _, _, collected in lines])
        means = self.mean({f"{i}/{name}": value for i, line in enumerate(local) for name, value in line.items()})
        written = []
        for i, ((role, counted, _), names) in enumerate(zip(lines, local, strict=True)):
            found = {name: means[f"{i}/{name}"] for name in names}
            unknown = set(found) - set(self.columns[role])
            assert not unknown, f"undeclared metrics: {unknown}"
            line: dict[str, Any] = {name: counted[name] for name in COUNTERS}
            line |= {name: _jsonable(found.get(name)) for name in self.columns[role]} | counted
            self._write(role, line)
            self._latest |= {f"{role}/{name}": found[name] for name in names}
            written.append((role, line))
        if written:
            self._show(line["step"], line["tick"], line["seconds_tick"])
        return written

    def reading(self, step: int, samples_seen: int, values: Mapping[str, float | None]) -> None:
        """One line of what was watched after the last tick."""
        line: dict[str, Any] = dict(zip(COUNTERS, (self._tick, step, samples_seen), strict=True))
        self._write("monitor", line | {name: _jsonable(value) for name, value in values.items()})

    def _write(self, role: str, line: dict[str, Any]) -> None:
        if not self.is_main:
            return
        with open(self.root / "loss_logs" / LOSS_FILES[role], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {f"{role}/{k}": v for k, v in line.items() if isinstance(v, float) and k not in COUNTERS}
        for tracker in self.trackers:
            tracker.scalars(numbers, line["step"], line["tick"])

    def _show(self, step: int, tick: int, seconds: float) -> None:
        if not self.is_main:
            return
        short = {k.replace("generator/", "").replace("guidance/", "gui_"): v for k, v in self._latest.items()}
        shown = {k: f"{v:.4g}" for k, v in short.items() if "loss" in k or k.startswith("reward")}
        self._bar.set_postfix({**shown, "ticks/s": f"{1 / max(seconds, 1e-9):.2f}"}, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            self.say(f"step {step} tick {tick} " + " ".join(f"{k} {v}" for k, v in shown.items()))

    def say(self, text: str) -> None:
        """One line for people: on the terminal and in log.txt."""
        if not self.is_main:
            return
        text = redact.clean(text)
        tqdm.write(text, file=sys.stderr)
        with open(self.root / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")

    def images(self, grid: Image.Image) -> None:
        """Sample images of the last tick; those that a resumed run draws again, trackers have already."""
        for tracker in self.trackers if self._tick >= self._first_tick else ():
            tracker.image("samples", grid, self._tick)

    def close(self) -> None:
        self._bar.close()
        for tracker in self.trackers:
            tracker.close()


def peak_memory_gib(device: torch.device | None) -> float:
    """The most that this process has held so far: what its tensors took on a GPU, its resident memory on the CPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    in_a_gib = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / in_a_gib


def _means(lines: Sequence[Collected]) -> list[dict[str, float]]:
    """The mean of each metric of each line.  All tensors, which lie on one device, come in one transfer."""
    tensors = [v for line in lines for values in line.values() for v in values if isinstance(v, Tensor)]
    read = iter(torch.stack([v.detach().float() for v in tensors]).tolist() if tensors else [])
    return [
        {name: _mean([next(read) if isinstance(v, Tensor) else v for v in values]) for name, values in line.items()}
        for line in lines
    ]


def _mean(values: Sequence[float]) -> float:
    return values[0] if len(values) == 1 else math.fsum(values) / len(values)


def _jsonable(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def cut_logs(root: Path, tick: int) -> None:
    """Drop the lines of ticks from ``tick`` on: a resumed run writes them again."""
    for name in LOSS_FILES.values():
        path = root / "loss_logs" / name
        if not path.exists():
            continue
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["tick"] >= tick:
                    break
            except (ValueError, KeyError):
                break  # torn by a crash
            kept.append(line + "\n")
        path.with_suffix(".tmp").write_text("".join(kept), encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)


class Tracker:
    """What a tracker is asked for.  Its axis is the tick: numbers of both roles and images are cut at the same place."""

    def scalars(self, values: Mapping[str, float], step: int, tick: int) -> None: ...

    def image(self, name: str, image: Image.Image, tick: int) -> None: ...

    def close(self) -> None: ...


class Tensorboard(Tracker):
    """Events from ``first_tick`` on that an interrupted start left are hidden: this one writes them again."""

    def __init__(self, root: Path, settings: Mapping[str, Any], first_tick: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(root / "trackers" / "tensorboard"), purge_step=first_tick)
        self.writer.add_text("settings", "```\n" + json.dumps(settings, indent=1) + "\n```", first_tick)

    def scalars(self, values: Mapping[str, float], step: int, tick: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, tick)

    def image(self, name: str, image: Image.Image, tick: int) -> None:
        import numpy as np

        self.writer.add_image(name, np.asarray(image), tick, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb(Tracker):
    """Offline unless a key is there; the run id is the folder's, so that a resumed run goes on in the same place.

    wandb takes no tick twice: online it keeps what an interrupted start sent, which a resumed run repeats bit for bit.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any], run_id: str) -> None:
        import wandb

        redact.guard_streams()  # wandb has just begun to keep what is written to the terminal: it gets it cleaned
        folder = root / "trackers"
        folder.mkdir(parents=True, exist_ok=True)
        self.wandb = wandb
        try:
            mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
            self.run = wandb.init(
                project="train-t2i", name=root.name, id=run_id, resume="allow", dir=str(folder), mode=mode,  # type: ignore[arg-type]
                config=dict(settings), settings=wandb.Settings(silent=True, disable_git=True, save_code=False),
            )  # fmt: skip
        except (wandb.Error, ValueError) as error:  # a ValueError: a variable that it cannot understand
            raise UserError(
                f"--report-to wandb: {error}", "run wandb login, or set WANDB_MODE=offline, or leave wandb out"
            ) from None

    def scalars(self, values: Mapping[str, float], step: int, tick: int) -> None:
        self.run.log({**values, "step": step}, step=tick)

    def image(self, name: str, image: Image.Image, tick: int) -> None:
        self.run.log({name: self.wandb.Image(image)}, step=tick)

    def close(self) -> None:
        self.run.finish()
        self.wandb.teardown()  # waits for its service, which writes an offline run's file after finish() has returned


def has_wandb_key() -> bool:
    """Whether somebody logged in to the wandb service that is set: a netrc may hold the keys of other services only."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).netloc
    try:
        hosts = netrc.netrc(os.environ.get("NETRC") or None).hosts
    except (OSError, UnicodeError, netrc.NetrcParseError):
        return False
    return bool((WANDB_CLOUD if host in WANDB_CLOUD else {host}) & hosts.keys())


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8-bit RGB."""
    array = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def grid_image(rows: Sequence[Tensor], *, gap_px: int = GAP_PX) -> Image.Image:
    """Rows of images, each (B, 3, H, W), stacked top to bottom on white."""
    height, width = rows[0].shape[-2:]
    count = max(len(row) for row in rows)
    canvas = Image.new("RGB", (count * (width + gap_px) + gap_px, len(rows) * (height + gap_px) + gap_px), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(to_pil(image), (gap_px + x * (width + gap_px), gap_px + y * (height + gap_px)))
    return canvas
