"""Every command of README.md and docs/*.md is one that the programs take: its flags parse, its files are there.

Nothing is started but launchers, whose interpreter is replaced by one that prints what it is given (``launched``).
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from documented import Command, blocks, commands
from test_scripts import LAUNCHERS, MULTI_NODE, ROOT, launched

from train_t2i import cli
from train_t2i.errors import UserError
from train_t2i.launch import nodes

# beginnings of commands of others: the files that they name are looked for, nothing else
FOREIGN = (
    "conda env create", "conda activate", "uv sync", "source .venv/bin/activate", "python -c", "python evaluation/evaluate_images.py",
)  # fmt: skip
WITHOUT_FLAGS = ("quickstart.sh", "test.sh", "benchmark_gpu.sh")


# -- what each program makes of its words ----------------------------------------------------------------------------


class Parsed(Exception):
    """The flags of a verb were taken."""


def parse_verb(verb: str, words: list[str]) -> None:
    """Up to where a verb's flags are parsed.  Raises UserError for one that it does not take."""
    if verb == "train":
        with suppress(SystemExit):  # --help
            cli.parse(words)
    elif verb == "plan":
        import_module("train_t2i.plan").parse_plan(words)
    elif verb == "doctor":
        import_module("train_t2i.doctor.examination").parse(words)
    else:
        module = import_module(f"train_t2i.{verb}")

        def parses(*given: Any) -> NoReturn:
            config = cli.parse_verb(*given)
            if verb == "fetch":
                for name in config.names:
                    module.entry_of(module.read_manifest(config.manifest), name)
            raise Parsed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "parse_verb", parses)
            with pytest.raises(Parsed):
                module.main(words)


def parse_launcher(script: Path, found: Command, work: Path) -> None:
    """The settings that a launcher would start, which ``--dry-run > FILE`` writes."""
    done = launched([str(script), *map(shlex.quote, found.words[2:])], work, **found.environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    settings = cli.parse(lines[lines.index("train_t2i") + 2 :])
    if found.output:
        values = {key: value for key, value in settings.as_dict().items() if key not in ("dry_run", "config")}
        (work / found.output).write_text(yaml.safe_dump(values))


def parse_script(script: Path, found: Command, work: Path) -> None:
    """``bash SCRIPT ...``."""
    assert script.is_file(), f"{script}: no such script"
    words = found.words[2:]
    if script.resolve() in {*LAUNCHERS, *MULTI_NODE}:
        parse_launcher(script.resolve(), found, work)
    elif script.name == "multi.sh":
        launch = nodes.read(words, found.environment)
        once = Command(["bash", launch.train_script, *launch.flags])
        parse_launcher(Path(launch.remote_dir, launch.train_script).resolve(), once, work)
    elif script.name == "benchmark.sh":
        parse_verb("benchmark", words)
    elif script.name == "chaos.sh":
        import_module("chaos").parser().parse_args(words)
    else:
        assert script.name in WITHOUT_FLAGS, f"{script.name}: say here how its words are parsed"
        assert not words


def run_all(block: str, work: Path) -> None:
    folder = ROOT
    for found in commands(block):
        folder = run(found, folder, work)


def run(found: Command, folder: Path, work: Path) -> Path:
    """Parse a command given in ``folder``; the folder in which the next one is."""
    words = found.words
    text = " ".join(words)
    if words[0] == "cd":
        assert (folder / words[1]).is_dir(), words[1]
        return folder / words[1]
    if text.startswith(FOREIGN):
        named = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-f"]
        assert all((folder / name).is_file() for name in named), named
    elif words[0].startswith("--"):  # flags of train, without the rest
        cli.parse(words)
    elif "-m" in words and words[words.index("-m") + 1] == "train_t2i":
        assert words[0] in ("python", "torchrun", "accelerate"), words[0]
        verb, *flags = words[words.index("-m") + 2 :]
        parse_verb(verb, flags)
    elif words[:3] == ["python", "-m", "rewards"]:
        import_module("rewards.__main__").parser().parse_args(words[3:])
    elif words[0] == "sbatch":
        assert (folder / words[-1]).is_file(), words[-1]
        assert (folder / found.environment["TRAIN_SCRIPT"]).is_file()
    else:
        assert words[0] == "bash", f"{words[0]}: say here how its words are parsed"
        parse_script(folder / words[1], found, work)
    return folder


@pytest.mark.parametrize("block", list(blocks()))
def test_every_command_is_one_that_the_programs_take(block: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run_all(block, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "python -m train_t2i sample RUN --no-such-flag", "python -m train_t2i train ... --batch-siz 3", "frobnicate",
        "torchrun --nproc-per-node 8 -m train_t2i cache --batch-siz 3", "bash scripts/gone.sh", "cd gone",
        "bash scripts/single_node/cold_start_sdxl.sh --batch-siz 3", "LORA_RANK=0 bash scripts/multi_node/cold_start_sdxl.sh",
        "MASTER_ADDR=a WORKER_NODES=b bash scripts/multi_node/multi.sh --batch-siz 3", "bash scripts/chaos.sh --no-such-flag",
        "WORKER_NODES=b bash scripts/multi_node/multi.sh", "python -m rewards score a.png --no-such-flag --reward clip",
        "for name in hpsv2.1 gone; do python -m train_t2i fetch \"$name\"; done", "conda env create -f gone.yml",
        "bash scripts/test.sh --no-such-flag", "python -m train_t2i plan --config gone.yaml", "--extra-rewards",
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_command_is_found(line: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, AssertionError, SystemExit)):
        run_all(line, tmp_path)


def test_commands_are_read_as_bash_reads_them() -> None:
    text = 'cd a && X=1 Y="b c" bash s.sh --q [--r S] B... \\\n  --t > out.yaml   # why; not\n'
    assert list(commands(text)) == [
        Command(["cd", "a"]),
        Command(["bash", "s.sh", "--q", "--r", "S", "B", "--t"], {"X": "1", "Y": "b c"}, "out.yaml"),
    ]
