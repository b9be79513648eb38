"""Runs that are killed at random and given the same command again, until they end as if nothing had happened.

    python tests/chaos.py [--kills 300] [--seed 0] [--out FILE.json] [--root FOLDER]

A history is one run: a method, a seed and a world size of 1 or 2, killed (SIGKILL) several times, then left to its end.
A kill comes at a random change of the disk in a save or a prune, half of a file written, or at any time of the process's
life; it takes the main process, the worker, or both.  Who is left must end by itself: told of the loss, or, when the
other died before they met, by its watchdog.  After every kill each checkpoint with a record must verify; at the end
every file of every checkpoint and every line of the logs must be that of a run that nobody killed.  One line a history,
then a summary; the exit code is 1 if anything was wrong.  SIGTERM and Ctrl-C end it early, with the summary.

Every process is forked from this one, which keeps to one thread and has the libraries and the models in memory.
"""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import argparse
import gc
import json
import mmap
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import tiny
import torch
from forked import Child
from trainer import Trainer, flags_of, make_copies, remember_models

from train_t2i import storage, train
from train_t2i.checkpoint import RunFolder
from train_t2i.errors import EXIT_HANG, EXIT_LOST

torch.set_num_threads(1)

STEPS, KEPT = 5, 2
COMMON = (
    f"--max-train-steps {STEPS} --checkpoint-steps 1 --checkpoints-total-limit {KEPT} --batch-size 1 "
    "--auto-resume --hang-seconds 15"
)
CASES = {
    "paired": ("dmdr", "--sample-steps 3"),
    "shared": ("dmdr", "--use-lora-gen --sample-num-steps 2 --ratio-update 1"),
    "sft": ("sft", "--caption-dropout 0.5"),
}
SEEDS, WORLDS, MOST_KILLS = (1, 2), (1, 2), 9
SAVE_SHARE = 0.4  # of the kills that are aimed at a save
LIMIT_S = 90.0  # for whatever must end by itself
IN_SAVE = 0  # a byte of the memory that a life shares with this process


@dataclass(frozen=True)
class Case:
    name: str
    seed: int
    world: int

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}, {self.world} process{'es' if self.world > 1 else ''}"


@dataclass
class Tally:
    kills: Counter = field(default_factory=Counter)  # (world, "in a save" or "elsewhere", who was killed)
    histories: int = 0
    resumes: int = 0
    seconds_left: list[float] = field(default_factory=list)  # from a kill to the end of the process that was left
    bad: list[str] = field(default_factory=list)

    def killed(self) -> int:
        return sum(self.kills.values())


class Chaos:
    def __init__(self, root: Path, chance: random.Random) -> None:
        self.root, self.chance, self.tally = root, chance, Tally()
        self.children: list[Child] = []  # of the last life
        self.wholes: dict[Case, tuple[Path, float, int]] = {}  # folder, seconds of a life, changes of the disk a step
        self.shared = mmap.mmap(-1, 1)
        data = root / "data"
        failed = apart(lambda: make_data(data), root / "data.out")
        assert failed is None, failed
        remember_models()
        flags = flags_of(root, data / "sdxl", data, data / "prompts.txt", data / "images" / "table.csv", data)
        self.trainer = Trainer(root, flags, lambda: ("", ""))
        for name, (method, more) in CASES.items():
            self.trainer.run(f"read-{name}", f"{more} --batch-size 1 --max-train-steps 1", method)
        make_copies(2)  # a generator and a teacher
        gc.collect()
        gc.freeze()  # a child has no need to look through what it inherits

    # -- one life ----------------------------------------------------------------------------------------------------

    def start(self, case: Case, folder: Path, on_change: Callable[[str, Path], object]) -> list[Child]:
        method, more = CASES[case.name]
        flags = f"{COMMON} {more} --seed {case.seed} --output-dir {folder}"
        arguments, output = self.trainer.arguments("run", flags, method), folder / "said"
        folder.mkdir(parents=True, exist_ok=True)
        self.shared[:] = bytes(1)

        def before(rank: int = 0) -> None:
            os.fsync = lambda descriptor: None  # a killed process loses nothing that was written
            if rank == 0:
                mark_saves(self.shared)
                storage.before = lambda name, path: on_change(name, path) if "checkpoints" in path.parts else None

        if case.world == 1:
            self.children = [forked.train(arguments, output, before)]
        else:
            self.children = forked.train_world(arguments, output, case.world, before)
        return self.children

    def whole(self, case: Case) -> tuple[Path, float, int]:
        """The run that nobody kills."""
        if case not in self.wholes:
            folder, changes, begun = self.root / f"whole-{len(self.wholes)}", mmap.mmap(-1, 4), time.monotonic()

            def count(name: str, path: Path) -> None:
                changes[:] = (int.from_bytes(changes[:]) + 1).to_bytes(4)

            children = self.start(case, folder, count)
            codes = [child.ends(LIMIT_S) for child in children]
            assert codes == [0] * case.world, said(children)
            self.wholes[case] = (folder / "run", time.monotonic() - begun, int.from_bytes(changes[:]) // STEPS)
        return self.wholes[case]

    def life(self, case: Case, folder: Path) -> bool:
        """The command given once, and a kill; whether the kill came before the end."""
        _, life_s, changes = self.whole(case)
        victims = self.chance.choice([[0], [1], [0, 1]] if case.world == 2 else [[0]])
        children: list[Child] = []
        aimed = self.chance.random() < SAVE_SHARE
        if aimed:
            nth, torn = self.chance.randint(1, 2 * changes), self.chance.random() < 0.5
            self.shared_pids = mmap.mmap(-1, 8)
            children = self.start(case, folder, AtChange(nth, torn, victims, self.shared_pids))
            if case.world == 2:
                self.shared_pids[:] = children[1].pid.to_bytes(8)
        else:
            children = self.start(case, folder, lambda name, path: None)
            wait_or_end(children, self.chance.uniform(0, life_s))
            for victim in victims:
                children[victim].send(signal.SIGKILL)
        killed_at = time.monotonic()
        codes = [child.ends(LIMIT_S) for child in children]
        dead = [rank for rank, code in enumerate(codes) if code == -signal.SIGKILL]
        others = [code for code in codes if code != -signal.SIGKILL]
        alone = all("phase meet after 0 ticks" in child.said() for child in children if child.code == EXIT_HANG)
        if set(others) - ({0, EXIT_LOST, *([EXIT_HANG] if alone else [])} if dead else {0}):
            raise AssertionError(f"exit codes {codes}: {said(children)}")
        if dead and others and not aimed:
            self.tally.seconds_left.append(time.monotonic() - killed_at)
        if dead:
            where = "in a save" if self.shared[IN_SAVE] else "elsewhere"
            self.tally.kills[case.world, where, "+".join(map(str, dead))] += 1
        return bool(dead)

    # -- one history -------------------------------------------------------------------------------------------------

    def history(self, most_kills: int) -> None:
        case = Case(self.chance.choice(list(CASES)), self.chance.choice(SEEDS), self.chance.choice(WORLDS))
        whole, _, _ = self.whole(case)
        number, kills = self.tally.histories, 0
        self.tally.histories += 1
        folder = self.root / f"history-{number}"
        try:
            for _ in range(min(most_kills, self.chance.randint(1, MOST_KILLS))):
                self.tally.resumes += kills > 0
                if not self.life(case, folder):
                    break
                kills += 1
                self.expect(damaged, folder / "run", folder)
            self.tally.resumes += 1
            children = self.start(case, folder, lambda name, path: None)
            codes = [child.ends(LIMIT_S) for child in children]
            if codes != [0] * case.world:
                raise AssertionError(f"exit codes {codes}: {said(children)}")
            self.expect(lambda run: difference(whole, run), folder / "run", folder)
            result = "same"
            shutil.rmtree(folder)
        except AssertionError as error:
            result = f"WRONG, kept in {folder}: {error}"
            self.tally.bad.append(f"history {number} ({case}): {error}")
        print(f"history {number}: {case}, {kills} kills: {result}", flush=True)

    def expect(self, check: Callable[[Path], str | None], run: Path, folder: Path) -> None:
        if found := apart(lambda: check(run), folder / "check.out"):
            raise AssertionError(found)

    def until(self, kills: int) -> None:
        while (left := kills - self.tally.killed()) > 0:
            self.history(left)


class AtChange:
    """At the n-th change of the disk, a write being half done or not, kill."""

    def __init__(self, nth: int, torn: bool, victims: list[int], pids: mmap.mmap) -> None:
        self.left, self.torn, self.victims, self.pids = nth, torn, victims, pids

    def __call__(self, operation: str, path: Path) -> None:
        self.left -= 1
        if self.left:
            return
        if operation == "write" and self.torn and 0 in self.victims:
            path.write_bytes(b"half of it")
        if 1 in self.victims:
            os.kill(int.from_bytes(self.pids[:]), signal.SIGKILL)
        if 0 in self.victims:
            forked.die()


def mark_saves(shared: mmap.mmap) -> None:
    """Tell the parent whether this process is inside a save or a prune."""

    def marked(work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            shared[IN_SAVE] = 1
            try:
                return work(*arguments)
            finally:
                shared[IN_SAVE] = 0

        return wrapped

    for name in ("save", "prune"):
        setattr(RunFolder, name, marked(getattr(RunFolder, name)))


def said(children: list[Child]) -> str:
    return "\n".join(child.said()[-2000:] for child in children)


def wait_or_end(children: list[Child], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and all(child.alive() for child in children):
        time.sleep(0.002)


# -- what is looked at, in processes of their own --------------------------------------------------------------------


def apart(work: Callable[[], str | None], output: Path) -> str | None:
    """What ``work`` returns in a process of its own."""
    output.unlink(missing_ok=True)

    def told() -> int:
        if found := work():
            print(found)
        return 1 if found else 0

    child = forked.fork(told, output)
    return (child.said().strip() or "nothing was said") if child.ends(LIMIT_S) else None


def make_data(folder: Path) -> None:
    folder.mkdir()
    tiny.save_sdxl(folder / "sdxl")
    tiny.save_prompts(folder / "prompts.txt")
    tiny.save_images(folder / "images")


def damaged(run: Path) -> str | None:
    """A checkpoint with a record is whole, whenever the process died."""
    folder = RunFolder(run)
    found = [folder.damage(folder.record(step)) for step in folder.steps()]
    return next((reason for reason in found if reason), None)


def contents(run: Path) -> dict[str, Any]:
    """Everything of a run that is a function of its settings: records, digests of all files, log lines."""
    folder = RunFolder(run)
    records = {step: storage.read_record(folder.record(step)) for step in folder.steps()}
    for record in records.values():
        del record["settings"]["output_dir"]
    files = sorted(str(file.relative_to(run)) for file in folder.folder.rglob("*"))
    logs = {role: tiny.log_lines(run, role) for role in ("generator", "guidance")}
    return {"records": records, "files": files, "logs": logs, "exit code": (run / ".exit_code").read_text()}


def difference(whole: Path, run: Path) -> str | None:
    if reason := damaged(run):
        return reason
    mine, expected = contents(run), contents(whole)
    if wrong := [name for name in expected if mine[name] != expected[name]]:
        return f"{', '.join(wrong)}: not as in a run that nobody killed"
    return None


# -- the program -----------------------------------------------------------------------------------------------------


def summary(tally: Tally, minutes: float, seed: int) -> dict[str, Any]:
    def of(place: int) -> dict[str, int]:
        counts: Counter = Counter()
        for key, count in tally.kills.items():
            counts[str(key[place])] += count
        return dict(counts)

    left = [round(seconds, 1) for seconds in sorted(tally.seconds_left)] or [0.0]
    middle, longest = left[len(left) // 2], left[-1]
    return {
        "kills": tally.killed(), "world size": of(0), "where": of(1), "killed rank": of(2), "histories": tally.histories,
        "resumes": tally.resumes, "bad": tally.bad,
        "seconds until the process that was left ended": {"median": middle, "longest": longest}, "minutes": round(minutes, 1), "seed": seed,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    made.add_argument("--kills", type=int, default=300)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="write the summary as JSON")
    made.add_argument("--root", type=Path, help="folder to work in (default: a temporary one)")
    return made


def main() -> int:
    given = parser().parse_args()
    assert train  # everything is imported before the first fork
    root = Path(tempfile.mkdtemp(prefix="chaos-", dir=given.root))
    begun, chaos = time.monotonic(), Chaos(root, random.Random(given.seed))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        chaos.until(given.kills)
    except KeyboardInterrupt:
        for child in chaos.children:
            child.send(signal.SIGKILL)
    result = summary(chaos.tally, (time.monotonic() - begun) / 60, given.seed)
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if given.out:
        given.out.write_text(text)
    if not chaos.tally.bad:
        shutil.rmtree(root)
    return 1 if chaos.tally.bad else 0


if __name__ == "__main__":
    sys.exit(main())
