"""Checkpoints that are either complete or not there: named objects in folders, and one record that commits them.

    ROOT/checkpoints/PART/step-N/STEM.safetensors, STEM.json      the objects
    ROOT/checkpoints/torch_units/step-N.pt                        the record, written last

The record is a plain dict (``torch.load(..., weights_only=True)``): what the caller gave, plus ``version``, ``step``
and ``manifest`` {file: [bytes, xxh3_128]}; its own digest is the comment at the end of the zip archive that it is.
No record, no checkpoint.  Nothing is parsed before its digest holds; the newest is computed, never stored.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from train_t2i import storage
from train_t2i.errors import EXIT_DISK, UserError
from train_t2i.storage import Damaged, Manifest

RECORDS = "torch_units"
TEMPORARY = ".tmp-"
STEP = re.compile(r"step-(0|[1-9][0-9]*)")
SPARE_BYTES = 1 << 20  # records, JSON, folders: what a save needs besides its tensors
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One folder of a checkpoint: file stem -> named tensors, and file stem -> a JSON value."""

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """The checkpoints of one run.  Only one process (rank 0) writes, and it holds ``lock``."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "checkpoints"

    def record(self, step: int) -> Path:
        """Where the record of ``step`` lies, whether it is there or not."""
        return self.folder / RECORDS / f"step-{step}.pt"

    def steps(self) -> list[int]:
        """Steps with a record, newest first; not verified."""
        found = (STEP.fullmatch(path.stem) for path in (self.folder / RECORDS).glob("step-*.pt"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of this folder, which is made if need be.  Raises UserError: EXIT_LOCKED, EXIT_USER."""
        try:
            storage.make_folder(self.root)
            held = storage.take_lock(self.root / ".lock")
        except OSError as error:
            raise UserError(
                f"cannot write to the output folder {self.root}: {error.strerror}", "choose another --output-dir"
            ) from None
        try:
            yield
        finally:
            storage.release_lock(held)

    def save(self, step: int, parts: Mapping[str, Part], record: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step`` and return its record's path; one that is there and verifies is left alone.

        ``record`` holds what torch loads with weights_only: numbers, text, lists, dicts, tensors.  When the disk is
        full or fails, what was begun is removed, older checkpoints stay, and UserError (EXIT_DISK) says so.
        """
        path = self.record(step)
        _check_names(parts)
        needed = len(storage.seal(step, {}, record)) + SPARE_BYTES + sum(_tensor_bytes(part) for part in parts.values())
        if path.exists() and not self.damage(path):
            return path
        try:
            if storage.free_bytes(self.folder) < needed:
                raise OSError(storage.FULL[0], os.strerror(storage.FULL[0]))
            self._remove(step)
            manifest = self._write_parts(step, parts)
            fresh = path.with_name(TEMPORARY + path.name)
            storage.make_folder(path.parent)
            storage.write_bytes(fresh, storage.seal(step, manifest, record))
            storage.rename(fresh, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._tidy(step)
            raise self._disk_error(step, needed, error) from error
        return path

    def _write_parts(self, step: int, parts: Mapping[str, Part]) -> Manifest:
        """Write every part under a temporary name, flush, then rename: the folders are whole before the record is."""
        manifest: Manifest = {}
        for name, part in parts.items():
            final = self.folder / name / f"step-{step}"
            fresh = final.with_name(TEMPORARY + final.name)
            storage.remove_tree(fresh)
            storage.make_folder(fresh)
            for stem, tensors in part.tensors.items():
                storage.write_tensors(fresh / f"{stem}.safetensors", tensors)
            for stem, value in part.values.items():
                storage.write_json(fresh / f"{stem}.json", value)
            storage.sync(fresh)
            for file in sorted(fresh.iterdir()):
                manifest[f"{name}/{final.name}/{file.name}"] = list(storage.digest(file))
            storage.rename(fresh, final)
        return manifest

    def load(self, record_path: Path, parts: Iterable[str] | None = None) -> tuple[dict[str, Part], dict[str, Any]]:
        """The parts (all, or those named) and the record of a checkpoint, verified before anything is parsed.

        Raises UserError in one line: no such file, damaged (which file, and how), no such part.
        """
        others = ", ".join(str(step) for step in self.steps()[:5]) or "none"
        try:
            record = storage.read_record(record_path)
            chosen = _part_names(record) if parts is None else list(parts)
            if missing := [name for name in chosen if name not in _part_names(record)]:
                raise UserError(
                    f"{record_path} has no part {', '.join(missing)}", f"it has: {', '.join(_part_names(record))}"
                )
            self._verify(record, chosen)
            return {name: self._read_part(record, name) for name in chosen}, record
        except Damaged as error:
            raise UserError(str(error), f"use another checkpoint; steps in this run: {others}") from None

    def _read_part(self, record: Mapping[str, Any], part: str) -> Part:
        tensors, values = {}, {}
        for name in record["manifest"]:
            file = self.folder / name
            if file.parts[-3] != part:
                continue
            try:
                if file.suffix == ".json":
                    values[file.stem] = json.loads(file.read_bytes())
                else:
                    tensors[file.stem] = safetensors.torch.load_file(file)
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                raise Damaged(f"{file} cannot be read: {error}") from None
        return Part(tensors, values)

    def _verify(self, record: Mapping[str, Any], parts: Iterable[str]) -> None:
        """Compare size and digest of every file of ``parts`` with the manifest.  Raises Damaged."""
        chosen = set(parts)
        for name, (size, expected) in record["manifest"].items():
            if name.split("/")[0] not in chosen:
                continue
            file = self.folder / name
            try:
                if (found := file.stat().st_size) != size:
                    raise Damaged(f"{file} is damaged: {found} bytes instead of {size}")
                if storage.digest(file) != (size, expected):
                    raise Damaged(f"{file} is damaged: its digest is not the one that was saved")
            except OSError as error:
                raise Damaged(f"{file} cannot be read: {error.strerror}") from None

    def damage(self, record_path: Path) -> str | None:
        """What is wrong with a checkpoint, in one line, or None.  Reads every file of it."""
        try:
            record = storage.read_record(record_path)
            self._verify(record, _part_names(record))
        except (Damaged, UserError) as error:
            return str(error)
        return None

    def latest(self) -> Path | None:
        """The newest checkpoint that verifies, or None; each damaged one that is passed over is a logged warning."""
        for step in self.steps():
            if reason := self.damage(self.record(step)):
                log.warning("passing over the checkpoint of step %d: %s", step, reason)
            else:
                return self.record(step)
        return None

    def prune(self, keep: int | None, good: int | None = None) -> None:
        """Remove all but the ``keep`` newest checkpoints, and never the last valid one.  None keeps all.

        The newest that is not later than the step ``good`` stays as well.  To be called after a save.  A checkpoint that cannot be removed is a warning: training goes on.
        """
        if keep is None:
            return
        if keep < 1:
            raise ValueError("keep must be at least 1")
        steps = self.steps()
        spared = next((step for step in steps if good is not None and step <= good), None)
        kept, old = steps[:keep], [step for step in steps[keep:] if step != spared]
        if old and all(self.damage(self.record(step)) for step in kept):
            last_valid = next((step for step in old if not self.damage(self.record(step))), None)
            old = [step for step in old if step != last_valid]
        for step in old:
            try:
                self._remove(step)
            except OSError as error:
                log.warning("cannot remove the old checkpoint of step %d: %s", step, error)

    def clean(self) -> list[str]:
        """Remove what crashed saves left and return its paths, as seen from the run folder.  Call it under ``lock``."""
        committed, removed = set(self.steps()), []
        for path in sorted(self.folder.glob("*/*")):
            match = STEP.fullmatch(path.name)
            half = match and path.is_dir() and path.parent.name != RECORDS and int(match[1]) not in committed
            if half or path.name.startswith(f"{TEMPORARY}step-"):
                storage.remove_tree(path)
                removed.append(str(path.relative_to(self.root)))
        return removed

    def _remove(self, step: int) -> None:
        """Remove a step, the record first: from then on it is no checkpoint, whatever is left of it."""
        if self.record(step).exists():
            storage.remove_file(self.record(step))
            storage.sync(self.record(step).parent)
        for path in sorted(self.folder.glob(f"*/step-{step}")):
            storage.remove_tree(path)

    def _tidy(self, step: int) -> None:
        """After a failed save: remove what it wrote, unless it had come as far as its record."""
        for path in sorted(self.folder.glob(f"*/{TEMPORARY}step-{step}*")):
            storage.remove_tree(path)
        if not self.record(step).exists():
            self._remove(step)

    def _disk_error(self, step: int, needed: int, error: OSError) -> UserError:
        free = storage.human(storage.free_bytes(self.folder))
        older = next((f"; the checkpoint of step {old} is intact" for old in self.steps() if old != step), "")
        return UserError(
            f"cannot save step {step} in {self.folder}: {error.strerror or error} "
            f"(needed {storage.human(needed)}, free {free}){older}",
            "make room (--checkpoints-total-limit keeps fewer), then run the same command with --auto-resume",
            EXIT_DISK,
        )


def run_of(record_path: Path) -> RunFolder:
    """The run that a record belongs to: ROOT of ROOT/checkpoints/torch_units/step-N.pt.  Raises UserError."""
    for path in (
        record_path.expanduser().absolute(),
        record_path.expanduser().resolve(),
    ):  # as named, then through links
        if STEP.fullmatch(path.stem) and path.suffix == ".pt":
            records, folder = path.parent, path.parent.parent
            if (records.name, folder.name) == (RECORDS, "checkpoints"):
                return RunFolder(folder.parent)
    raise UserError(
        f"{record_path} is not a checkpoint of a run",
        f"give OUTPUT_DIR/EXP_NAME/checkpoints/{RECORDS}/step-N.pt, and leave its files where they were saved",
    )


def _check_names(parts: Mapping[str, Part]) -> None:
    """Mistakes of the caller, not of a person: they raise ValueError."""
    words = [*parts, *(stem for part in parts.values() for stem in (*part.tensors, *part.values))]
    if wrong := [word for word in words if not re.fullmatch(r"\w+", word, re.ASCII) or word == RECORDS]:
        raise ValueError(f"not usable as a file name: {wrong}")
    if empty := [name for name, part in parts.items() if not part.tensors and not part.values]:
        raise ValueError(f"nothing in {empty}")


def _part_names(record: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.split("/")[0] for name in record["manifest"]))


def _tensor_bytes(part: Part) -> int:
    return sum(tensor.nbytes for tensors in part.tensors.values() for tensor in tensors.values())
