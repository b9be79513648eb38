"""Keeps secrets out of whatever leaves the program: the terminal, logs, records, trackers, pages.  One rule for all.

A secret is the value of an environment variable that is named like one, the password in an address (of the text, or of
any variable), what follows ``token=`` and its like, and what looks like a token of a known service.  The standard
library alone, and nothing is kept: the environment is read at each call.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
SHORTEST = 8  # a shorter value of a variable is a word, not a secret: it would be hidden wherever it stands
NAMED = re.compile(
    r"(?:^|_)(?:[A-Z0-9]*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?|PASS|PAT)(?:_|$)", re.IGNORECASE
)
PASSWORD = re.compile(r"""(?:^|://)[^\s/?#:'"]*:([^\s/?#'"]+)@""")  # proxies may be written without a scheme
RULES = (
    ("a password in an address", re.compile(r"""(?<=://)[^\s/?#'"<>]+(?=@)""")),
    (
        "a token",
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|wandb_v\d_\w{20,})"
        ),
    ),
    (  # of an address, a header, a call or a flag
        "a token",
        re.compile(
            r"""(?ix)
            (?P<before> \b [\w.-]* (?: token | api[_-]?key | secret | passw(?:or)?d | signature | credential )
                        (?: ['"]? \s* = \s* ['"]? | ['"] \s* : \s* ['"] )
                      | \b authorization ['"]? \s* [:=] \s* ['"]? (?: (?: basic | bearer | token ) \s+ )?
                      | \b bearer \s+ )
            [^\s'",;&]{8,}"""
        ),
    ),
)


def named(variable: str) -> bool:
    """Whether a variable's name says that it holds a secret: ``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``, ``DB_PASS``."""
    return NAMED.search(variable) is not None


def of_environment() -> Iterator[tuple[str, str]]:
    """(variable, a secret in it)."""
    for name, value in os.environ.items():
        found = [value.strip()] if named(name) else []
        for password in PASSWORD.findall(value):
            found += [password, unquote(password)]
        for secret in found:
            is_path = os.sep in secret and os.path.exists(secret)  # noqa: PTH110 - pathlib raises where it is too long
            if len(secret) >= SHORTEST and not is_path:
                yield name, secret


def clean(text: str) -> str:
    """The text with ``***`` in place of every secret."""
    for _, secret in sorted(of_environment(), key=lambda pair: -len(pair[1])):  # one may be a part of another
        text = text.replace(secret, HIDDEN)
    for _, pattern in RULES:
        text = pattern.sub(lambda match: (match.groupdict().get("before") or "") + HIDDEN, text)
    return text


def clean_bytes(line: bytes) -> bytes:
    return clean(line.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def clean_values(value: Any) -> Any:
    """Every text in nested dicts and lists, cleaned."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {key: clean_values(inner) for key, inner in value.items()}
    return [clean_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def secret_in(text: str) -> str:
    """What kind of secret a text holds, in words that do not tell it; empty: none."""
    for name, secret in of_environment():
        if secret in text:
            return f"the value of {name}"
    return next((what for what, pattern in RULES if pattern.search(text)), "")


def guard_streams() -> None:
    """From here on, all that is written to the terminal is cleaned: by us, by libraries, and a traceback at the end."""
    for stream in (sys.stdout, sys.stderr):
        _guard(stream)


def _guard(stream: Any) -> None:
    write = stream.write
    stream.write = lambda text: write(clean(text))
