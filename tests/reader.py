"""Who does what the pages say: runs documented commands one after the other, in their tiny form (tiny_docs.py).

Verbs run inside this process, as ``python -m train_t2i`` would; so does what a launcher starts, once bash has run the launcher.
Programs of several processes, and what a page itself starts with TINY=1, are started as they stand.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from documented import ROOT, Command, commands
from forked import free_port
from test_scripts import launched
from tiny_docs import MODELS, NOT_RUN, OF_TRAIN, OF_VERBS, STANDS_FOR

from rewards.__main__ import main as score
from rewards.weights import sha256_of
from train_t2i.__main__ import main

CHECKPOINTS = str(ROOT / "checkpoints")
STEP = re.compile(r"step-\d+\.pt")  # of the stage before, which has one
RUN = re.compile(r"(?:^|=)runs/(\w+)")
LAUNCHER = re.compile(r"scripts/(?:single|multi)_node/(?!multi\.|slurm\.)\w+\.sh")


def tiny(block: str) -> str:
    """A block in its tiny form."""
    for said in STANDS_FOR:
        block = replaced(block, said)
    return block


def replaced(block: str, said: str) -> str:
    """A row of STANDS_FOR, where its words stand alone."""
    return re.sub(rf"(?<![\w/.-]){re.escape(said)}(?![\w-])", lambda _: STANDS_FOR[said], block)


def reason(found: Command) -> str | None:
    """The entry of NOT_RUN that a command falls under."""
    text = " ".join(found.words)
    return next((begin for begin in NOT_RUN if text.startswith(begin)), None)


@dataclass
class Desk:
    """A folder in which commands are given.  ``shared``'s files lie on it; runs that it lacks are made there, by their launchers."""

    folder: Path
    shared: Desk | None = None
    numbers: Iterator[int] = field(default_factory=count)  # of runs that have no name of their own

    def __post_init__(self) -> None:
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        for place in (Path(), Path("runs")) if self.shared else ():
            for file in (self.shared.folder / place).iterdir():
                if file.name != "runs":
                    self.borrow(place / file.name)

    def borrow(self, name: Path) -> None:
        assert self.shared
        (self.folder / name).symlink_to(self.shared.folder / name)

    def own(self, name: str) -> None:
        """What a command makes is made here, though somebody has it."""
        if (self.folder / name).is_symlink():
            (self.folder / name).unlink()

    def need(self, words: Sequence[str]) -> None:
        """Runs that a command names and nobody has made yet."""
        for name in {name for word in words for name in RUN.findall(word)}:
            launcher = ROOT / "scripts/single_node" / f"{name}.sh"
            if (self.folder / "runs" / name).exists() or not launcher.exists():
                continue
            if self.shared is None:
                self.launch(launcher, [], Command([]))
                continue
            self.shared.need([f"runs/{name}"])
            self.borrow(Path("runs", name))

    # -- commands ----------------------------------------------------------------------------------------------------

    def run_all(self, block: str) -> None:
        """Every command of a documented block that is run here.  Raises AssertionError."""
        place = ROOT
        for found in commands(tiny(block)):
            if found.words[0] == "cd":
                place = place / found.words[1]
            elif not reason(found):
                self.run(found, place)

    def run(self, found: Command, place: Path) -> None:
        values = {"checkpoints": CHECKPOINTS, "port": str(free_port()), "pickscore_digest": self.pickscore_digest()}
        words = [word.format_map(values) for word in found.words]
        if "--out" in words:
            self.own(words[words.index("--out") + 1])
        verb = words.index("train_t2i") + 1 if "train_t2i" in words else 0
        if verb:
            words = [*words[: verb + 1], *self.told(words[verb], words[verb + 1 :])]
        self.need(words)
        if len(words) > 1 and LAUNCHER.search(words[1]):
            self.launch(place / words[1], words[2:], found)
        elif words[:3] == ["python", "-m", "train_t2i"]:
            self.inside(main, words[3:], found)
        elif words[:3] == ["python", "-m", "rewards"]:
            self.inside(score, [file for word in words[3:] for file in self.files(word)], found)
        elif words[0].startswith("--"):  # flags of train, without the rest
            self.inside(main, ["train", *self.told("train", words)], found)
        else:
            self.start([str(place / word) if word.endswith(".sh") else word for word in words], found)

    def told(self, verb: str, flags: list[str]) -> list[str]:
        """The flags of a verb, with those of tiny_docs before and behind them."""
        if "--help" in flags or "--config" in flags:
            return flags
        before = "" if "--pretrained-model" in flags else MODELS.get(verb, "")
        behind = f"{OF_TRAIN['all']} {OF_TRAIN['dmdr']}" if verb == "train" else OF_VERBS.get(verb, "")
        given = before.format(checkpoints=CHECKPOINTS, number=next(self.numbers))
        return [*shlex.split(given), *flags, *shlex.split(behind)]

    def launch(self, script: Path, flags: list[str], found: Command) -> None:
        """A launcher, in the column of the tiny world."""
        told = launched([str(script), *map(shlex.quote, flags)], self.folder, **{**found.environment, "TINY": "1"})
        assert told.returncode == 0, told.stderr
        words = [STEP.sub("step-1.pt", word) for word in told.stdout.splitlines()]
        set_to = dict(word.removeprefix("--").partition("=")[::2] for word in words)
        short = shlex.split(f"{OF_TRAIN['all']} {OF_TRAIN[set_to['method']]}")
        if "resume-ckpt" in set_to:
            short += ["--max-train-steps", "2"]
        self.need(words)
        if "--dry-run" not in words:
            self.own(f"runs/{set_to['exp-name']}")
        self.begin(script, flags, words, short, found)
        left = self.folder / "runs" / set_to["exp-name"] / "checkpoints" / "torch_units"
        assert "--dry-run" in words or [*left.glob("step-*.pt")], f"{script.name} left no checkpoint"

    def begin(self, script: Path, flags: list[str], words: list[str], short: list[str], found: Command) -> None:
        """What a launcher would start, ``words``; or the launcher."""
        if found.environment.get("TINY"):
            self.start(["bash", str(script), *flags, *short], found)
        elif words[:2] == ["-m", "train_t2i"]:
            self.inside(main, [*words[2:], *short], found)
        else:
            self.start(["python", *words, *short], found)

    # -- how they are run --------------------------------------------------------------------------------------------

    def inside(self, program: Callable[[Sequence[str]], int], words: list[str], found: Command) -> None:
        """In this process."""
        said, complaints = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaints):
            try:
                code = program(words)
            except SystemExit as end:  # --help
                code = int(end.code or 0)
        right = (0, 2) if words[0] == "doctor" else (0,)  # 2: it found problems
        assert code in right, f"{shlex.join(words)}\n{complaints.getvalue()[-3000:]}"
        self.keep(found, said.getvalue())

    def start(self, words: list[str], found: Command) -> None:
        """In processes of its own, by the interpreter of this one."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        here = {
            "PATH": path,
            "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        done = subprocess.run(
            words, cwd=self.folder, env={**os.environ, **here, **found.environment}, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        self.keep(found, done.stdout)

    def keep(self, found: Command, said: str) -> None:
        if found.output:
            (self.folder / found.output).write_text(said)

    def files(self, word: str) -> list[str]:
        return sorted(file.name for file in self.folder.glob(word)) if "*" in word else [word]

    def pickscore_digest(self) -> str:
        return sha256_of(self.folder / "PickScore_v1" / "model.safetensors")
