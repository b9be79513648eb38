"""All looks, one after the other: the installation, the machine, the weights, and a recipe where one is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train_t2i.config import Config, Settings, flag
from train_t2i.doctor import installation, machine
from train_t2i.doctor.findings import Finding, looked
from train_t2i.plan import PlanConfig, planned, split

FOLDER = installation.ROOT / "checkpoints"  # where fetch puts weights, in the checkout
MANIFEST = FOLDER / "manifest.toml"


@dataclass(frozen=True)
class DoctorConfig(PlanConfig):
    """What is here and what is wrong.  With flags of train (see python -m train_t2i train --help), also what that run needs."""

    digests: bool = flag(False, "read all weights files whole, and print their sha256 (seconds a GB)")
    out: str | None = flag(None, "JSON file to write")


def parse(arguments: Sequence[str]) -> tuple[DoctorConfig, Settings | None]:
    """The recipe is None where no flag of it is given.  Raises UserError."""
    config, rest = split(DoctorConfig, "doctor", arguments)
    return config, planned(rest) if rest or config.model else None


def examine(config: DoctorConfig, settings: Settings | None) -> list[Finding]:
    """Whatever fails on the way is a finding itself."""
    found = [*looked("packages", installation.versions)]
    broken = [*looked("toolkit", installation.imports)]
    if not (broken and any(finding.way_out for finding in found)):  # a package that is missing says it already
        found += broken
    found += looked("memory", machine.memory)
    if broken and broken[0].subject == "torch":
        return [*found, Finding("not looked at", "devices, weights, recipes: torch is needed for them")]
    found += looked("devices", machine.gpus)
    found += looked("hub", machine.hub)
    if settings is None:
        found += looked("runs", lambda: machine.disk("runs", Path(Config().output_dir)))
    found += looked("weights", lambda: weights(config.digests))
    if settings is None:
        return found
    if broken:
        return [*found, Finding("not looked at", "the recipe: the trainer cannot be imported")]
    from train_t2i.doctor import recipe

    return [*found, *recipe.examine(config, settings)]


def weights(digests: bool) -> Iterator[Finding]:
    """What the manifest names and is here; the rest in one line."""
    from train_t2i.doctor.weights import digests_in, look_at, place_of
    from train_t2i.fetch import read_manifest

    absent = []
    for name, entry in read_manifest(str(MANIFEST)).items():
        path = place_of(name, entry, FOLDER)
        if path.exists():
            known = digests_in(entry, path)
            yield from looked(name, lambda: look_at(name, path, known, digests=digests))  # noqa: B023 - used at once
        else:
            absent.append(name)
    if absent:
        yield Finding("not fetched", f"{', '.join(absent)} (python -m train_t2i fetch NAME)")
