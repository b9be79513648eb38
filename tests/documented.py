"""The commands of README.md and docs/*.md, as bash would read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"for (\w+) in (.*?); do (.*?); done")
ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=.*", re.DOTALL)


def blocks() -> Iterator[Any]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{line}")


@dataclass
class Command:
    """One command: variables before it, its words, and the file that takes its output."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    output: str | None = None


def unrolled(line: str) -> str:
    """A loop as its commands, one after the other."""

    def repeat(match: re.Match[str]) -> str:
        return "; ".join(match[3].replace(f'"${match[1]}"', value) for value in match[2].split())

    return LOOP.sub(repeat, line)


def commands(block: str) -> Iterator[Command]:
    """Those of a block, without comments and without what stands for words of the reader's: ``...``, ``[`` and ``]``."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(unrolled(line), posix=True, punctuation_chars=";&>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "&&"):
                if words:
                    yield command(words)
                words = []
            elif word.strip("[.]"):
                words.append(re.sub(r"\.\.\.$", "", word).strip("[]"))


def command(words: list[str]) -> Command:
    output = None
    if ">" in words:
        words, output = words[: words.index(">")], words[words.index(">") + 1]
    first = next(i for i, word in enumerate(words) if not ASSIGNMENT.fullmatch(word))
    return Command(words[first:], dict(word.split("=", 1) for word in words[:first]), output)
