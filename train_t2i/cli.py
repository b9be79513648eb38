"""Flags and YAML -> Settings.  ``-`` and ``_`` are equal, a later flag wins, diffusers' spellings are understood."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from train_t2i import redact
from train_t2i.config import METHOD_CONFIGS, METHOD_NAMES, Config, Settings, fields_of
from train_t2i.config_checks import check, check_bounds
from train_t2i.errors import UserError

# diffusers' and VideoX-Fun's training scripts -> ours
ALIASES = {
    "pretrained_model_name_or_path": "pretrained_model",
    "pretrained_teacher_model": "pretrained_model",
    "pretrained_vae_model_name_or_path": "vae",
    "train_batch_size": "batch_size",
    "dataloader_num_workers": "num_workers",
    "learning_rate": "learning_rate_gen",
    "rank": "lora_rank",
    "checkpointing_steps": "checkpoint_steps",
    "validation_steps": "sample_steps",
    "validation_prompts": "sample_prompts",
    "resume_from_checkpoint": "resume_ckpt",
    "cold_start_steps": "cold_start_iter",
    "train_data_meta": "data_path_train",
    "image_sample_size": "resolution",
    "train_mode": "model_family",
}

# fields of verbs that may stand without a flag -> their flag
STANDING = {"runs": "run", "names": "name", "files": "file"}
# fields that are repeated flags -> their flag
REPEATED = {**STANDING, "sources": "source"}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, "see --help")


def spelled(argument: str, aliases: Mapping[str, str] = ALIASES) -> str:
    """``--train_batch-size=4`` style spelling -> ours; anything that is not a flag stays as it is."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    field = name.replace("-", "_")
    return "--" + aliases.get(field, field).replace("_", "-") + equals + value


def parse_bool(text: str, words: Sequence[str] = (), parts: Sequence[str] = ()) -> bool | str:
    """on/off values of plain flags, and the ``words`` that one takes besides: absent value means on.

    One that has ``parts`` may be on for some of them, ``a+c``; all of them are on.
    """
    lowered = text.lower()
    if (named := set(lowered.split("+"))) <= set(parts):
        return named == set(parts) or "+".join(part for part in parts if part in named)
    if lowered in words:
        return lowered
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    some = (f"some of {'+'.join(parts)}",) if parts else ()
    raise argparse.ArgumentTypeError(f"{text!r} is {' nor '.join(('neither on', 'off', *words, *some))}")


def field_types(kind: type) -> dict[str, type]:
    """The plain types of a dataclass's fields by name: ``str | None`` is str."""
    return {name: plain_type(hint) for name, hint in typing.get_type_hints(kind).items()}


def plain_type(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def add_flags(parser: argparse.ArgumentParser, kind: type, title: str) -> None:
    group, of_types = parser.add_argument_group(title), field_types(kind)
    for field in dataclasses.fields(kind):
        option = "--" + field.name.replace("_", "-")
        of_type = of_types[field.name]
        shown = "" if field.default in (None, ()) else f" (default: {field.default!r})"
        extra: dict[str, Any] = {"type": of_type, "choices": field.metadata["choices"] or None}
        if of_type is bool:
            words, parts = field.metadata["words"], field.metadata["parts"]
            extra = {
                "type": partial(parse_bool, words=words, parts=parts),
                "nargs": "?",
                "const": True,
                "metavar": "|".join(("on", "off", *words, *parts)),
            }
        if typing.get_origin(of_type) is tuple:
            option = "--" + REPEATED.get(field.name, field.name).replace("_", "-")
            extra = {"action": "append", "dest": field.name, "metavar": option[2:].upper()}
        help_text = (field.metadata["help"] + shown).replace("%", "%%")
        group.add_argument(option, default=argparse.SUPPRESS, help=help_text, **extra)


def make_parser(method: str) -> Parser:
    parser = Parser(prog="python -m train_t2i train", description=__doc__, allow_abbrev=False)
    add_flags(parser, Config, "every method")
    add_flags(parser, METHOD_CONFIGS[method], f"--method {method}")
    return parser


def read_yaml(path: str) -> dict[str, Any]:
    """Settings from a YAML mapping; its values go through the same parser as flags do."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read ({' '.join(str(error).split())})") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"--config {path}: not a mapping of settings", "write NAME: VALUE lines")
    return loaded


def yaml_arguments(values: dict[str, Any]) -> list[str]:
    return [spelled(f"--{key}={value}") for key, value in values.items() if value is not None]


def refuse_secrets(words: Sequence[str]) -> None:
    """Raises UserError for a word of a command line, or of its YAML file, that holds a secret: flags go into records, into
    trackers, and into the list of processes."""
    for before, word in zip(("", *words), words):
        if kind := redact.secret_in(word):
            name = word.partition("=")[0] if word.startswith("-") else before
            raise UserError(
                f"{name}: holds {kind}, and what a flag holds is written down in many places",
                "leave it out: log in with `hf auth login` or `wandb login`, or set HF_TOKEN or WANDB_API_KEY",
            )


def parse(arguments: Sequence[str]) -> Settings:
    """Command line (without the verb) -> checked Settings."""
    given = [spelled(argument) for argument in arguments]
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=None)
    first.add_argument("--config", default=None)
    early, _ = first.parse_known_args([a for a in given if a not in ("-h", "--help")])
    from_file = yaml_arguments(read_yaml(early.config)) if early.config else []
    early_file, _ = first.parse_known_args(from_file)
    refuse_secrets([*from_file, *given])
    method = early.method or early_file.method or "dmdr"
    if method not in METHOD_NAMES:
        raise UserError(f"--method {method}: unknown", f"one of {', '.join(METHOD_NAMES)}")
    parser = make_parser(method)
    namespace, unknown = parser.parse_known_args(from_file + given)
    if unknown:
        raise _unknown_flag(unknown[0], method)
    values = vars(namespace)
    own = {f.name for f in dataclasses.fields(METHOD_CONFIGS[method])}
    settings = Settings(
        run=Config(**{k: v for k, v in values.items() if k not in own}),
        method=METHOD_CONFIGS[method](**{k: v for k, v in values.items() if k in own}),
    )
    check(settings)
    return settings


def rehearse(arguments: Sequence[str]) -> bool:
    """Parse and check; ``--dry-run`` prints the settings and is True: there is nothing more to do.

    The printout is a file for ``--config``: the flags that made it are no part of it, or it could never train.
    """
    settings = parse(arguments)
    if settings.run.dry_run:
        printed = {name: value for name, value in settings.as_dict().items() if name not in ("dry_run", "config")}
        print(yaml.safe_dump(printed, sort_keys=False, allow_unicode=True), end="")
    return settings.run.dry_run


def _unknown_flag(argument: str, method: str) -> UserError:
    name = argument.partition("=")[0]
    field = name.removeprefix("--").replace("-", "_")
    for other in METHOD_NAMES:
        if other != method and field in fields_of(other):
            return UserError(
                f"{name} does nothing for --method {method}", f"it belongs to --method {other}: leave it out"
            )
    return UserError(f"{name}: unknown flag", "see python -m train_t2i train --help")


def parse_verb(kind: type, verb: str, arguments: Sequence[str]) -> Any:
    """Flags of a verb other than train -> its dataclass, bounds checked.

    A field of type ``tuple[str, ...]`` is a flag that may be repeated; those of ``STANDING`` may also stand without one.
    A verb's own names win over the aliases of training scripts.
    """
    own = {field.name for field in dataclasses.fields(kind)}
    aliases = {theirs: ours for theirs, ours in ALIASES.items() if theirs not in own and ours in own}
    parser = Parser(prog=f"python -m train_t2i {verb}", description=kind.__doc__, allow_abbrev=False)
    bare = next((name for name in STANDING if name in own), None)
    if bare is not None:
        parser.add_argument(
            "standing", nargs="*", metavar=STANDING[bare].upper(), help=f"the same as --{STANDING[bare]}"
        )
    add_flags(parser, kind, "flags")
    refuse_secrets(arguments)
    namespace, unknown = parser.parse_known_intermixed_args([spelled(argument, aliases) for argument in arguments])
    if unknown:  # its value may be a secret
        raise UserError(f"{unknown[0].partition('=')[0]}: unknown flag", f"see python -m train_t2i {verb} --help")
    values = vars(namespace)
    standing = tuple(values.pop("standing", None) or ())
    for field in dataclasses.fields(kind):
        if field.name in values and isinstance(values[field.name], list):
            values[field.name] = tuple(values[field.name])
        if field.name in values:
            check_bounds("--" + field.name.replace("_", "-"), values[field.name], field.metadata)
    if bare is not None and standing:
        values[bare] = (*standing, *values.get(bare, ()))
    return kind(**values)
