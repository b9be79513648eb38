"""Weights on the disk: what is there, whether it is whole, and its digest.  Headers are read, not tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rewards.weights import DOWNLOAD_AGAIN, SUFFIXES, read_shapes, sha256_of
from train_t2i.doctor.findings import Finding
from train_t2i.errors import UserError
from train_t2i.storage import human

READ_WHOLE = "--digests prints its sha256"


def files_of(path: Path) -> list[Path]:
    """The weights files of a folder, or the file itself."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and ".cache" not in file.parts)


def check_shards(folder: Path) -> None:
    """Raises UserError where an index names a file that is not there."""
    for index in sorted(folder.rglob("*.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: cannot be read ({error})", DOWNLOAD_AGAIN) from None
        if missing := sorted(name for name in names if not (index.parent / name).is_file()):
            raise UserError(f"{index.parent / missing[0]}: is missing, {len(missing)} of {len(names)}", DOWNLOAD_AGAIN)


def look_at(subject: str, path: Path, known: Mapping[str, str] | None = None, *, digests: bool) -> Iterator[Finding]:
    """Every file is whole by its header, and has the digest that is ``known`` for it (its path below -> sha256).

    ``digests``: they are computed and told also where none is known.  Raises RewardError, UserError.
    """
    known = known or {}
    files = files_of(path)
    if path.is_dir():
        check_shards(path)
    if not files:
        raise UserError(f"{path}: holds no weights", DOWNLOAD_AGAIN)
    told, tensors = [], 0
    for file in files:
        if file.suffix in SUFFIXES:  # the manifest names prompts as well
            tensors += len(read_shapes(file))
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        if name not in known and not digests:
            continue
        found = sha256_of(file)
        if found != known.get(name, found).lower():
            raise UserError(f"{file}: its sha256 is {found}, the manifest says {known[name]}", DOWNLOAD_AGAIN)
        told.append((name, found))
    if missing := sorted(set(known) - {name for name, _ in told}):
        raise UserError(f"{path / missing[0]}: is missing", DOWNLOAD_AGAIN)
    size = human(sum(file.stat().st_size for file in files))
    right = f"{len(told)} sha256 as in the manifest" if known else "" if digests else READ_WHOLE
    held = f", {tensors} tensors" if tensors else ""
    shown = f"{path}: {len(files)} file{'s' * (len(files) > 1)}{held}, {size}"
    yield Finding(subject, f"{shown}{', ' * bool(right)}{right}")
    if digests:
        yield from (Finding(subject, f"sha256 {digest}  {name}") for name, digest in told)


def digests_in(entry: Mapping[str, Any], path: Path) -> dict[str, str]:
    """File -> sha256 of an entry of the manifest, which has one for a file, or a table of them for a folder."""
    known = entry.get("sha256") or {}
    return {path.name: known} if isinstance(known, str) else dict(known)


def place_of(name: str, entry: Mapping[str, Any], folder: Path) -> Path:
    """Where ``fetch`` puts an entry, or the project keeps it."""
    return folder / str(entry.get("local_name") or Path(str(entry.get("file") or name)).name)
