"""What a student was made from, and on which terms: base model, rewards, initial weights, of every stage that is known.

Names and licences are those of checkpoints/manifest.toml; a base model that it does not have may bring its own card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i.checkpoint import RECORDS, run_of
from train_t2i.config import DMDRConfig, Settings
from train_t2i.errors import UserError
from train_t2i.fetch import read_manifest
from train_t2i.hub import NAME
from train_t2i.reward_flags import wanted_rewards
from train_t2i.student import find_record

MANIFEST = "checkpoints/manifest.toml"
UNKNOWN = "not known here: ask whoever published it"


@dataclass(frozen=True)
class Origin:
    """Something that others published (or that is made here), without a path of this machine."""

    name: str
    repository: str | None  # of the hub
    licence: str  # in words
    metadata: Mapping[str, str]  # license, license_name, license_link, as a card's metadata has them; may be empty


FUNCTION = Origin("a function of one's own", None, UNKNOWN, {})


def origin(given: str, manifest: Mapping[str, Mapping[str, Any]]) -> Origin:
    """Of a hub id, a folder or a file.  A local one is known by its last name alone."""
    last = Path(given).name
    for name, entry in manifest.items():
        local = entry.get("local_name") or name
        if given == entry.get("repository") or (last == local and given != last) or given == local:
            return Origin(name, entry.get("repository") or None, str(entry.get("licence") or UNKNOWN), hub_terms(entry))
    if (card := Path(given) / "README.md").is_file():
        return of_card(card)
    if NAME.fullmatch(given) and not Path(given).exists():
        return Origin(given, given, UNKNOWN, {})
    return Origin("a local file that is not in the manifest", None, UNKNOWN, {})


def hub_terms(entry: Mapping[str, Any]) -> dict[str, str]:
    """The licence of a manifest's entry as a card's metadata."""
    if not (known := entry.get("licence_id")):
        return {}
    named = {"license": known, "license_name": entry.get("licence_name")}
    if known == "other" and entry.get("repository"):
        named["license_link"] = f"https://huggingface.co/{entry['repository']}"
    return {key: str(value) for key, value in named.items() if value}


def of_card(path: Path) -> Origin:
    """A base model by the card in its folder; one that cannot be read says nothing."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(path).data
    except (OSError, ValueError, yaml.YAMLError):
        return Origin("a local model whose card cannot be read", None, UNKNOWN, {})
    found = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link")}
    terms = {key: value for key, value in found.items() if isinstance(value, str) and value}
    return Origin(
        "a local model, licence as in its card",
        None,
        terms.get("license_name") or terms.get("license") or UNKNOWN,
        terms,
    )


@dataclass(frozen=True)
class Stage:
    """A run on the way to a student, the last one first."""

    settings: Settings
    record: Mapping[str, Any]


def own_record(given: str | None) -> Path | None:
    """A checkpoint of a run that is here, or nothing."""
    path = Path(given) if given else None
    return path if path and path.parent.name == RECORDS and path.is_file() else None


def stages(run: str, step: int) -> tuple[list[Stage], bool]:
    """(the run of a student and those that it began from, whether all of them were found)."""
    found: dict[Path, Stage] = {}
    complete, queue = True, [find_record(run, str(step))]
    while queue:
        path = queue.pop(0)
        folder = run_of(path)
        if folder.root.resolve() in found:
            continue
        try:
            _, record = folder.load(path, [])
            stage = Stage(Settings.from_dict(record["settings"]), record)
        except (UserError, KeyError):  # damaged, or of a method that is gone
            complete = False
            continue
        found[folder.root.resolve()] = stage
        before = own_record(stage.settings.run.resume_ckpt)
        earlier = before is not None and run_of(before).root.resolve() != folder.root.resolve()
        complete &= earlier or not record["first_step"]
        given = (before if earlier else None, *map(own_record, initial_weights(stage.settings)))
        queue += [record for record in given if record is not None]
    return list(found.values()), complete


def initial_weights(settings: Settings) -> list[str]:
    return [path for path in (settings.run.generator_init, settings.run.xl_ode_pretrain_path) if path]


def built_on(found: list[Stage], manifest: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Origin]]:
    """(what for, what) of everything that the stages name, each once; runs of ours are stages themselves."""
    named: list[tuple[str, str]] = []
    for stage in found:
        run = stage.settings.run
        named.append(("base model", run.pretrained_model))
        named += [("VAE", run.vae)] if run.vae else []
        named += [("initial weights", path) for path in initial_weights(stage.settings) if not own_record(path)]
        if isinstance(stage.settings.method, DMDRConfig):
            for reward in wanted_rewards(stage.settings.method):
                named.append((f"reward {reward.column}", reward.path or ""))
    return [(role, origin(given, manifest) if given else FUNCTION) for role, given in dict.fromkeys(named)]


def read() -> dict[str, dict[str, Any]]:
    """The manifest."""
    return read_manifest(MANIFEST)
