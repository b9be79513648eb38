"""``python -m train_t2i plan``: what a run will take on each device, before a GPU is paid for.

It takes the flags of ``train``, a launcher's row for one.  The trainer's own tick is rehearsed on tensors without content
and every byte that comes and goes is counted; weights, gradients and optimizer are shared out as the backend does.
No weights are needed: the published models' shapes are known, and a local folder's are read from its config files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from train_t2i.cli import ALIASES, Parser, add_flags, parse, spelled
from train_t2i.config import EDIT_FAMILIES, RECOMPUTABLE, Settings, flag, resolved_layout, source_counts
from train_t2i.config_checks import check_bounds
from train_t2i.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from train_t2i.families.published import Published
    from train_t2i.plan.rehearsal import Rehearsal

MODELS = (
    "sdxl", "sd3_medium", "sd35_medium", "sd35_large", "flux_dev", "qwen_image", "qwen_image_edit", "qwen_image_edit_2509",
    "qwen_image_edit_2511",
)  # fmt: skip


@dataclass(frozen=True)
class PlanConfig:
    """What a run will take on each device.  All flags of train are taken too: see python -m train_t2i train --help."""

    model: str | None = flag(None, "published model to plan, instead of --pretrained-model", choices=MODELS)
    num_sources: int = flag(1, "sources a row, square ones, of an edit model", low=0, high=3)
    num_processes: int = flag(1, "processes in all, one a device", low=1)


def split(kind: type, verb: str, arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """(a verb's own flags, those of train).  ``--family`` is short for ``--model-family``.  Raises UserError."""
    parser = Parser(prog=f"python -m train_t2i {verb}", description=kind.__doc__, allow_abbrev=False)
    add_flags(parser, kind, "flags")
    given = [spelled(argument, {**ALIASES, "family": "model_family"}) for argument in arguments]
    own, rest = parser.parse_known_args(given)
    for field in fields(kind):
        if getattr(own, field.name, None) is not None:
            check_bounds("--" + field.name.replace("_", "-"), getattr(own, field.name), field.metadata)
    return kind(**vars(own)), rest


def planned(rest: Sequence[str]) -> Settings:
    """The run that is planned: without a launcher, a backend that is not named is ddp.  Raises UserError."""
    settings = parse(rest)
    if settings.run.backend == "auto":
        settings = replace(settings, run=replace(settings.run, backend="ddp"))
    return settings


def parse_plan(arguments: Sequence[str]) -> tuple[PlanConfig, Settings]:
    config, rest = split(PlanConfig, "plan", arguments)
    return config, planned(rest)


def main(arguments: Sequence[str]) -> int:
    config, settings = parse_plan(arguments)
    from train_t2i.build import check_family_flags
    from train_t2i.plan.estimate import Lever, estimate, levers
    from train_t2i.plan.floor import floor
    from train_t2i.plan.model import published_of
    from train_t2i.plan.page import page, told_floor, told_levers
    from train_t2i.plan.traffic import told_traffic

    name, published = published_of(settings.run, config.model)
    run, world = replace(settings.run, model_family=published.family), config.num_processes
    check_family_flags(run, published.family)
    check_sources(config, published.family)
    published = replace(published, num_sources=config.num_sources)
    found = rehearsed(replace(settings, run=run), published, world)
    plan = estimate(run, found, world)
    print("\n".join(page(name, run, resolved_layout(run), world, found, plan)), flush=True)
    turned = levers(run, found, world)
    if not run.keeps_on_host:
        way = "host" if run.recomputed == RECOMPUTABLE else True
        again = replace(run, gradient_checkpointing=way)
        other = rehearsed(replace(settings, run=again), published, world)
        told = "--gradient-checkpointing" + (f" {way}" if isinstance(way, str) else "")
        turned.insert(0, Lever(f"{told} (counted)", estimate(again, other, world)))
    least = told_floor(run, floor(run, found, world))
    print("\n".join([*told_levers(plan, turned), *least, *told_traffic(run, found, world)]))
    return EXIT_DONE


def check_sources(config: PlanConfig, family: str) -> None:
    if family not in EDIT_FAMILIES:
        if config.num_sources != PlanConfig.num_sources:
            raise UserError(f"--num-sources does nothing for {family}, which has none", "leave it out")
        return
    least, most = source_counts(family)
    if not least <= config.num_sources <= most:
        raise UserError(f"--num-sources {config.num_sources}: {family} takes {least} to {most}", "give one of these")


def rehearsed(settings: Settings, published: Published, world: int) -> Rehearsal:
    """Raises UserError for what the networks themselves refuse: a size, a length."""
    from train_t2i.plan.estimate import gradient_share, is_gathered
    from train_t2i.plan.rehearsal import rehearse

    run = settings.run
    try:
        return rehearse(
            settings, published, gradient_share=gradient_share(run, world), gathered=is_gathered(run, world)
        )
    except (ValueError, RuntimeError, TypeError) as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"this run cannot be rehearsed: {told}", "see --resolution, --text-length, --model") from error
