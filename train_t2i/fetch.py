"""``python -m train_t2i fetch NAME...``: download what checkpoints/manifest.toml names, and check its digest.

An entry is a table [GROUP."NAME"] or [NAME] of the manifest: what, licence (of a teacher also as cards say it, licence_id and
licence_name), repository, repository_type (model, dataset), revision, file (or none: the whole folder, without other formats
and half-precision copies), local_name, and sha256 of the file where it is known.  What is made here rather than downloaded has no repository.  Without a name the verb lists
what there is.  A broken download goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i import redact
from train_t2i.cli import parse_verb
from train_t2i.config import flag
from train_t2i.errors import EXIT_DISK, EXIT_DONE, UserError

CHUNK_BYTES = 1 << 22
# of a folder: copies of the same weights in other formats
NOT_NEEDED = (
    "*.bin",
    "*.ckpt",
    "*.pt",
    "*.msgpack",
    "*.onnx*",
    "*openvino*",
    "*.fp16.*",
    "sd_xl_*.safetensors",
    "*.png",
    "*.jpg",
)


@dataclass(frozen=True)
class FetchConfig:
    """Download weights or data that the manifest names, and check them; without a name, list them."""

    names: tuple[str, ...] = flag((), "what to fetch (may stand without the flag)")
    out: str = flag("checkpoints", "folder to put it in")
    manifest: str = flag("checkpoints/manifest.toml", "list of what there is")


def read_manifest(path: str) -> dict[str, dict[str, Any]]:
    """Name -> its table.  Raises UserError."""
    file = Path(path)
    if not file.is_file() and not file.is_absolute():
        file = Path(__file__).resolve().parents[1] / path  # called from another folder
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--manifest {path}: no such file", "run in the project's folder") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--manifest {path}: cannot be read ({error})") from None
    return entries_in(tables)


def entries_in(tables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> entry; a table that holds nothing but tables is a group of entries."""
    entries: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        if isinstance(table, dict) and table and all(isinstance(inner, dict) for inner in table.values()):
            entries |= entries_in(table)
        elif isinstance(table, dict):
            entries[name] = table
    return entries


def listing(manifest: Mapping[str, Mapping[str, Any]]) -> str:
    width = max((len(name) for name in manifest), default=0)
    lines = []
    for name, entry in manifest.items():
        where = entry.get("repository") or "made here"
        licence = entry.get("licence")
        lines.append(f"{name:{width}}  {entry.get('what', where)} ({where}{f'; {licence}' if licence else ''})")
    return "\n".join(lines)


def entry_of(manifest: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if name not in manifest:
        raise UserError(f"{name}: not in the manifest", f"it has: {', '.join(manifest) or 'nothing'}")
    entry = manifest[name]
    if not entry.get("repository"):
        made = f"it is made by: {entry['command']}" if entry.get("command") else "it comes with the project"
        raise UserError(f"{name}: is not downloaded from anywhere", made)
    local = entry.get("local_name") or Path(str(entry.get("file") or name)).name
    if Path(local).is_absolute() or ".." in Path(local).parts:
        raise UserError(f"{name}: local_name {local} leaves the folder of downloads", "correct the manifest")
    return entry | {"local_name": local}


def sha256_of(path: Path) -> str:
    from tqdm import tqdm

    digest = hashlib.sha256()
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="checking", leave=False) as bar,
    ):
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def check_digest(path: Path, entry: Mapping[str, Any]) -> str:
    """What was checked, in words.  Raises UserError where the digest is another."""
    wanted = str(entry.get("sha256") or "").lower()
    if not wanted or not path.is_file():
        return "no digest is known for it"
    found = sha256_of(path)
    if found != wanted:
        raise UserError(
            f"{path}: its sha256 is {found}, the manifest says {wanted}", "not used: remove it and fetch it again"
        )
    return "its sha256 is right"


def download(name: str, entry: Mapping[str, Any], staging: Path) -> Path:
    """Fetch into ``staging`` and return the file or folder there.  Raises UserError in one line."""
    import httpx
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    where = {"repo_id": entry["repository"], "revision": entry.get("revision") or None, "local_dir": str(staging)}
    where["repo_type"] = entry.get("repository_type") or "model"
    try:
        if entry.get("file"):
            return Path(hf_hub_download(filename=entry["file"], **where))
        return Path(snapshot_download(ignore_patterns=list(NOT_NEEDED), **where))
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise UserError(f"{staging}: {error.strerror}", "make room and run the same command", EXIT_DISK) from None
        said = re.sub(r"\s+", " ", redact.clean(str(error))).strip()[:200]
        raise UserError(
            f"{name}: cannot be downloaded from {entry['repository']} ({type(error).__name__}: {said})",
            "check the connection (and `hf auth login` where a licence must be accepted), then run the same command",
        ) from None


def fetch(name: str, entry: Mapping[str, Any], out: Path) -> str:
    """Download, check, then put in place under its local name: what is there is whole.  One line about it."""
    target = out / str(entry["local_name"])
    if target.exists():
        return f"{target}: already there, {check_digest(target, entry)}"
    staging = out / ".fetch" / name
    try:
        staging.mkdir(parents=True, exist_ok=True)
        fetched = download(name, entry, staging)
        try:
            checked = check_digest(fetched, entry)
        except UserError:
            shutil.rmtree(staging, ignore_errors=True)  # or the next try would take it from there
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched, target)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(target / ".cache", ignore_errors=True)  # the downloader's notes about a folder
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})", "choose another folder") from None
    return f"{target}: fetched, {checked}"


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(FetchConfig, "fetch", arguments)
    manifest = read_manifest(config.manifest)
    if not config.names:
        print(listing(manifest))
        return EXIT_DONE
    entries = {name: entry_of(manifest, name) for name in config.names}
    for name, entry in entries.items():
        print(fetch(name, entry, Path(config.out)))
    return EXIT_DONE
