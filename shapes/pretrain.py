"""Trains every model of the embedded world and writes it to `checkpoints/`, in half precision and with fixed seeds.

    python -m shapes.pretrain                       # everything that is missing or whose recipe has changed
    python -m shapes.pretrain --only clip hps       # these stages
    python -m shapes.pretrain --force denoiser      # again, whatever is there, and what builds on it

A stage whose output exists with the digest of its recipe (and of the recipes it builds on) is skipped, so an interrupted run goes
on where it stopped when it is started without --force, which begins anew each time.  `checkpoints/tiny-recipes.json` keeps the
digests, the seconds of the start that finished, and the measured quality.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shapes import edit_stages, flow_stages, sdxl_stages
from shapes.manifest import write_manifest
from shapes.stage import PICTURES, Paths, Stage

STAGES = (*sdxl_stages.STAGES, *flow_stages.STAGES, *edit_stages.STAGES)
STARTS: dict[str, tuple[str, Callable[[Paths], Path]]] = {  # stage -> the one that leaves in `work` what it starts from
    "hps": ("clip", lambda paths: paths.clip_trainee),
    "flux-guidance": ("flux", flow_stages.undistilled),
}


def digest(stage: Stage) -> str:
    """Digest of a stage's recipe and of all that it builds on."""
    below = [digest(other) for other in STAGES if other.name in stage.needs]
    return hashlib.blake2b(repr((stage.name, stage.recipe, PICTURES, below)).encode(), digest_size=8).hexdigest()


def run_name(stage: Stage) -> str:
    """The folder in `work` of a stage that the trainer trains."""
    return f"{stage.name}-{digest(stage)}"


def run_folders(stage: Stage, paths: Paths) -> list[Path]:
    """That folder and those of its later legs, NAME-STEPS (finetune.py)."""
    name = run_name(stage)
    return [paths.work / name, *paths.work.glob(f"{name}-*")]


def read_record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_record(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def present(stage: Stage, paths: Paths) -> bool:
    known = read_record(paths.record).get(stage.name, {})
    return known.get("digest") == digest(stage) and stage.output(paths).exists()


def with_dependents(names: set[str]) -> set[str]:
    """These stages and all that build on them."""
    found = set(names)
    for stage in STAGES:  # each comes after what it needs
        if found & set(stage.needs):
            found.add(stage.name)
    return found


def plan(paths: Paths, only: set[str], force: set[str]) -> list[Stage]:
    """What is to be made, in order: what is forced, missing or of another recipe, and what builds on that."""
    forced, todo = with_dependents(force), list[Stage]()
    for stage in STAGES:
        stale = not present(stage, paths) or any(other.name in stage.needs for other in todo)
        if stage.name in forced or (stage.name in only and stale):
            todo.append(stage)
    return todo


def forget(paths: Paths, stages: set[str]) -> None:
    """Nothing of these stages counts as done any more, nor goes on where it stopped."""
    record = {name: known for name, known in read_record(paths.record).items() if name not in stages}
    write_record(paths.record, record)
    for stage in STAGES:
        if stage.name in stages:
            for folder in run_folders(stage, paths):
                shutil.rmtree(folder, ignore_errors=True)


def run(stage: Stage, paths: Paths) -> None:
    """Make one stage and note what came of it; what was built on the old one is forgotten first."""
    forget(paths, with_dependents({stage.name}) - {stage.name})
    print(f"{stage.name}: training", flush=True)
    start = time.monotonic()
    measured = {key: round(value, 4) for key, value in stage.make(paths, run_name(stage)).items()}
    seconds = round(time.monotonic() - start)
    print(f"{stage.name}: done in {seconds} s, {measured}", flush=True)
    known = {"digest": digest(stage), "seconds": seconds, "measured": measured}
    write_record(paths.record, {**read_record(paths.record), stage.name: known})


def main(argv: list[str] | None = None) -> None:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m shapes.pretrain", description="Train the tiny models.")
    parser.add_argument("--out", type=Path, default=Path("checkpoints"), help="where the models go")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="where intermediate files go")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="stages to run")
    parser.add_argument(
        "--force", nargs="+", choices=names, default=[], help="stages to run even if present, with what builds on them"
    )
    args = parser.parse_args(argv)
    paths = Paths(args.out, args.work)
    for folder in (paths.out, paths.work):
        folder.mkdir(parents=True, exist_ok=True)
    todo = plan(paths, set(args.only), set(args.force))
    names = [stage.name for stage in todo]
    for name, (maker, start) in STARTS.items():
        if name in names and maker not in names and not start(paths).exists():
            parser.error(
                f"stage {name} starts from {start(paths)}, which is not there: add --force {maker}, which makes it"
            )
    print(f"to make: {', '.join(names) or 'nothing, all is present'}", flush=True)
    if args.force:
        forget(paths, with_dependents(set(args.force)))
    for stage in todo:
        run(stage, paths)
    write_manifest(paths.out, read_record(paths.record))


if __name__ == "__main__":
    main()
