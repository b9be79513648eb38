"""Who may import whom, read off the source, and what no file may do.

A module's room is its first name under ``train_t2i`` (``families/sdxl.py`` is in ``families``), or ``rewards`` or
``shapes``.  Imports inside functions count as well.  A file that has no row of its own is a verb.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("train_t2i", "rewards", "shapes")

# room -> the rooms it may import, beside itself, `errors` and `redact`.
ROOMS = {
    "redact": set(),
    "errors": set(),
    "sizes": set(),
    "guard": set(),
    "config": {"sizes"},
    "data": {"sizes"},
    "log": set(),
    "losses": set(),
    "schedule": set(),
    "randomness": set(),
    "sampling": {"schedule", "randomness"},
    "networks": {"families.base", "schedule", "config"},
    "families": {"schedule"},
    "policies": {"schedule"},
    "methods": {
        "networks",
        "sampling",
        "losses",
        "schedule",
        "randomness",
        "policies",
        "families.base",
        "config",
        "rewards.micro_batches",
    },
    "engine": set(),
    "watchdog": set(),
    "checkpoint": {"engine"},
    "prompt_cache": {"families.base", "storage"},
    "train": {
        "config",
        "data",
        "engine",
        "checkpoint",
        "log",
        "networks",
        "methods",
        "families",
        "rewards",
        "randomness",
        "prompt_cache",
        *(
            "build",
            "reward_terms",
            "feed",
            "sheet",
            "run",
            "resume",
            "watchdog",
            "monitor",
            "guard",
            "plan",
        ),  # its own parts, which other verbs share
    },
    "launch": set(),
    "rewards": set(),
    "shapes": {"families"},  # what trains the tiny models calls them as the trainer does; never the other way round
}
# modules that belong to a room of another name, and keep its rules
ANNEXES = {
    "cli": "config",
    "flags": "config",
    "rates": "config",
    "entries": "config",
    "gmflow": "policies",
    "policy_head": "policies",
    "method_configs": "config",
    "config_checks": "config",
    "acting_flags": "config",
    "reward_flags": "config",
    "storage": "checkpoint",
    "base_quant": "networks",
    "adapters": "networks",
    "compiled": "networks",
    "on_host": "networks",
    "peers": "engine",
    "prepare": "train",
    "environment": "train",
    "tables": "data",
    "prompts": "data",
    "distinct": "data",
    "hub": "data",
    "pair_data": "data",
    "image_data": "data",
    "pictures": "data",
    "rows": "data",
    "mapped": "prompt_cache",
    "packing": "prompt_cache",
    "prompt_index": "prompt_cache",
    "text_key": "prompt_cache",
}
# room -> the third-party packages it may import; a room that is not named may import any that is not reserved.
LIBRARIES = {
    "redact": set(),
    "errors": set(),
    "guard": set(),
    "sizes": set(),
    "config": {"yaml"},
    "data": {"torch", "numpy", "PIL", "pyarrow", "xxhash", "tqdm", "datasets", "safetensors"},
    "losses": {"torch"},
    "schedule": {"torch"},
    "randomness": {"torch", "numpy"},
    "sampling": {"torch"},
    "policies": {"torch"},
    "methods": {"torch"},
    "networks": {"torch", "peft", "safetensors", "bitsandbytes"},
    "families": {"torch", "diffusers", "transformers", "safetensors", "open_clip", "huggingface_hub", "numpy", "PIL"},
    "engine": {"torch", "numpy", "accelerate", "deepspeed", "bitsandbytes"},
    "checkpoint": {"torch", "numpy", "safetensors", "xxhash"},
    "prompt_cache": {"torch", "numpy", "xxhash", "pyarrow", "huggingface_hub"},
    "launch": {"yaml"},  # of a node, once its environment is there; the master needs the standard library alone
    "rewards": {
        "torch",
        "torchvision",
        "open_clip",
        "transformers",
        "safetensors",
        "PIL",
    },  # PIL reads the files it scores
    "shapes": {"torch", "numpy", "diffusers", "open_clip", "transformers", "tokenizers", "safetensors", "PIL", "tqdm"},
}
RESERVED = {"accelerate": ("engine",), "deepspeed": ("engine",), "bitsandbytes": ("engine", "networks")}
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "open_clip", "peft", "wandb", "matplotlib"}
LIGHT = (
    "train_t2i/__init__.py",
    "train_t2i/__main__.py",
    "train_t2i/errors.py",
    "train_t2i/redact.py",
    "rewards/__init__.py",
    "rewards/base.py",
    "shapes/__init__.py",
)
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def room_of(parts: tuple[str, ...]) -> str:
    """('train_t2i', 'families', 'sdxl') -> 'families'; ('rewards', 'clip') -> 'rewards'."""
    if parts[0] != "train_t2i":
        return parts[0]
    return ANNEXES.get(parts[1], parts[1]) if len(parts) > 1 else "train_t2i"


def module_parts(path: str) -> tuple[str, ...]:
    parts = Path(path).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def is_module(parts: tuple[str, ...]) -> bool:
    file = ROOT.joinpath(*parts)
    return file.with_suffix(".py").exists() or (file / "__init__.py").exists()


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, dotted parts) of everything a file imports, also inside functions and through ``import_module("...")``."""
    package = module_parts(path) if path.endswith("__init__.py") else module_parts(path)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                whole = (*base, alias.name)
                yield node.lineno, whole if base[0] in PACKAGES and is_module(whole) else base
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, tuple(name.value.split("."))


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def wrong_imports(path: str, source: str) -> list[str]:
    """What a file imports against the rules; one line each."""
    tree, parts, found = ast.parse(source), module_parts(path), []
    room = room_of(parts)
    allowed = ROOMS.get(room)  # None: a verb, or the package itself
    for line, target in imports(path, tree):
        name = ".".join(target)
        if target[0] in PICKLES:
            found.append(f"{path}:{line}: {name} runs code from files; use safetensors or JSON")
        elif target[0] in PACKAGES:
            other = room_of(target)
            exact = ".".join(target[1:]) if target[0] == "train_t2i" else name
            if other in (room, "errors", "redact", "train_t2i") and (target[0] == parts[0]):
                continue
            if other == "shapes" or (allowed is not None and other not in allowed and exact not in allowed):
                found.append(f"{path}:{line}: {room} may not import {name}")
        elif target[0] not in sys.stdlib_module_names:
            if target[0] in RESERVED and room not in RESERVED[target[0]]:
                found.append(f"{path}:{line}: only {' and '.join(RESERVED[target[0]])} may import {target[0]}")
            elif target[0] not in LIBRARIES.get(room, {target[0]}):
                found.append(f"{path}:{line}: {room} may not import {target[0]}")
    return found


def heavy_at_start(path: str, source: str) -> list[str]:
    """Slow packages that a file imports when it is imported itself: ``--help`` and ``import rewards`` stay quick."""
    body = [
        node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom | ast.Try | ast.With)
    ]
    found = imports(path, ast.Module(body=body, type_ignores=[]))
    return [
        f"{path}:{line}: {target[0]} is slow; import it in a function" for line, target in found if target[0] in HEAVY
    ]


def forbidden(path: str, source: str) -> list[str]:
    """Calls that would trust what a stranger wrote, and names of the small test world in the product."""
    found, tree = [], ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            torch_load = isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load"
            if torch_load and given.get("weights_only") is not True:
                found.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
            if "shell" in given and given["shell"] is not False:
                found.append(f"{path}:{node.lineno}: shell=True; pass a list of arguments")
            if "trust_remote_code" in given and given["trust_remote_code"] is not False:
                found.append(f"{path}:{node.lineno}: trust_remote_code=True runs a stranger's code")
            if ast.unparse(node.func) in ("os.system", "os.popen"):
                found.append(f"{path}:{node.lineno}: {ast.unparse(node.func)}; use subprocess with a list")
        elif isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            found.append(f"{path}:{node.lineno}: write torch.load in full, so that this test sees it")
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            found += [f"{path}:{node.lineno}: {key} in a dict" for key in keys if key == "trust_remote_code"]
        elif isinstance(node, ast.Constant) and "checkpoints/tiny" in str(node.value):
            exempt = id(node) in docstrings or path.startswith("shapes/")
            found += [] if exempt else [f"{path}:{node.lineno}: the product knows nothing of the tiny world"]
    return found


def sources(*folders: str) -> list[str]:
    found = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return [file.relative_to(ROOT).as_posix() for file in found if "__pycache__" not in file.parts]


@pytest.mark.parametrize("path", sources(*PACKAGES))
def test_rooms_import_what_they_may(path):
    assert not wrong_imports(path, (ROOT / path).read_text("utf-8"))


@pytest.mark.parametrize("path", sources(*PACKAGES, "scripts"))
def test_nothing_trusts_a_stranger(path):
    assert not forbidden(path, (ROOT / path).read_text("utf-8"))


@pytest.mark.parametrize("path", [path for path in LIGHT if (ROOT / path).exists()])
def test_what_starts_a_program_is_light(path):
    assert not heavy_at_start(path, (ROOT / path).read_text("utf-8"))


def test_no_launcher_trusts_remote_code():
    files = [file for kind in ("*.sh", "*.yaml", "*.yml") for file in (ROOT / "scripts").rglob(kind)]
    assert not [file.name for file in files if "trust_remote_code" in file.read_text("utf-8")]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train_t2i/losses.py", "import numpy"),
        ("train_t2i/losses.py", "from . import schedule"),
        ("train_t2i/schedule.py", "def f():\n    from train_t2i.losses import dmd"),
        ("train_t2i/sampling.py", "from train_t2i import networks"),
        ("train_t2i/networks.py", "from train_t2i.families import sdxl"),
        ("train_t2i/networks.py", "import train_t2i.families"),
        ("train_t2i/methods/dmdr.py", "from ..engine import Engine"),
        ("train_t2i/methods/dmdr.py", "import rewards"),
        ("train_t2i/config.py", "import torch"),
        ("train_t2i/cli.py", "from train_t2i.data import read"),
        ("train_t2i/evaluate.py", "from shapes.oracle import adherence"),
        ("train_t2i/evaluate.py", "import importlib\nimportlib.import_module('shapes.oracle')"),
        ("train_t2i/export.py", "from accelerate import Accelerator"),
        ("train_t2i/train.py", "import deepspeed"),
        ("train_t2i/export.py", "import pickle"),
        ("train_t2i/prompt_cache.py", "from train_t2i.families import load_family"),
        ("train_t2i/packing.py", "from train_t2i.config import Config"),
        ("train_t2i/text_key.py", "import transformers"),
        ("train_t2i/prompts.py", "from train_t2i.prompt_cache import PromptCache"),
        ("rewards/clip.py", "from train_t2i.errors import UserError"),
        ("rewards/clip.py", "import diffusers"),
        ("train_t2i/launch/watch.py", "from train_t2i.config import Config"),
        ("train_t2i/launch/watch.py", "import torch"),
        ("shapes/pretrain.py", "from train_t2i.train import main"),
    ],
)
def test_the_rules_bite(path, source):
    assert wrong_imports(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train_t2i/losses.py", "import math\nimport torch.nn.functional as F\nfrom train_t2i.errors import UserError"),
        (
            "train_t2i/networks.py",
            "from train_t2i.families.base import Cond\nfrom train_t2i.families import base\nimport peft",
        ),
        ("train_t2i/methods/dmdr.py", "from train_t2i import losses\nfrom .base import Batch"),
        ("train_t2i/cli.py", "from train_t2i.config import Config\nimport yaml"),
        ("train_t2i/train.py", "from rewards import REWARDS\nfrom train_t2i.randomness import draw"),
        ("train_t2i/evaluate.py", "from train_t2i.sampling import few_step\nimport scipy"),
        (
            "train_t2i/prompt_cache.py",
            "from train_t2i.families.base import Cond\nfrom train_t2i import packing, storage",
        ),
        (
            "train_t2i/cache.py",
            "from train_t2i import build, prompt_index\nfrom train_t2i.prompt_cache import PromptCache",
        ),
        ("train_t2i/engine.py", "import accelerate\nimport deepspeed"),
        ("rewards/clip.py", "from rewards import tower\nimport open_clip"),
    ],
)
def test_the_rules_allow_what_the_design_does(path, source):
    assert not wrong_imports(path, source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
        "subprocess.run(command, shell=True)",
        "Model.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "os.system('ls')",
        "path = 'checkpoints/tiny-clip'",
    ],
)
def test_forbidden_calls_are_seen(source):
    assert forbidden("train_t2i/example.py", source)
    assert not forbidden(
        "train_t2i/example.py", "torch.load(path, weights_only=True)\nsubprocess.run(command, shell=False)"
    )
