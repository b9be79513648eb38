"""The installation: versions against what pyproject.toml asks for, and whether the trainer can be imported at all.

The standard library alone, but for ``packaging``, which compares versions.
"""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

from train_t2i import __version__
from train_t2i.doctor.findings import Finding, first_line

ROOT = Path(__file__).resolve().parents[2]
ANEW = "make the environment anew: bash scripts/setup.sh (or uv sync --frozen)"
PROGRAMS = ("torch", "torchvision", "train_t2i.train")  # the last imports all that training does
SHOWN = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "open-clip-torch",
    "safetensors",
    "huggingface-hub",
)
OPTIONAL = {"deepspeed": "--backend zero2, zero3", "bitsandbytes": "8-bit AdamW, --base-quant", "datasets": "hub: data"}


def versions() -> Iterator[Finding]:
    """The toolkit's, Python's and the packages'; what is missing or too old is a problem."""
    yield Finding("train_t2i", f"{__version__} in {ROOT}")
    yield Finding("python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}")
    there = {name: version for name in SHOWN if (version := version_of(name))}
    yield Finding("packages", ", ".join(f"{name} {version}" for name, version in there.items()) or "none")
    extras = [f"{name} {version_of(name) or 'not installed'} ({use})" for name, use in OPTIONAL.items()]
    yield Finding("optional", ", ".join(extras))
    python, needed = requirements()
    if python and not meets(platform.python_version(), python):
        yield Finding("python", f"{platform.python_version()} is not {python}", ANEW)
    for name, wanted in needed.items():
        version = version_of(name)
        if version is None:
            yield Finding(name, f"is not installed{f' (needs {wanted})' if wanted else ''}", ANEW)
        elif not meets(version, wanted):
            yield Finding(name, f"{version} is not {wanted}", ANEW)


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> tuple[str, dict[str, str]]:
    """(what Python has to be, package -> what its version has to be): of the checkout, else of the installed toolkit."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        python, lines = project["requires-python"], project["dependencies"]
    else:
        about = metadata.metadata("train-t2i")
        python = about["Requires-Python"] or ""
        lines = [line for line in metadata.requires("train-t2i") or [] if "extra ==" not in line]
    found = (re.fullmatch(r"([A-Za-z0-9._-]+)\s*([^;]*).*", line) for line in lines)
    return python, {match[1]: match[2].strip() for match in found if match}


def meets(version: str, wanted: str) -> bool:
    """Whether a version is what is wanted; without ``packaging``, which many packages need, nobody can tell."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def imports() -> Iterator[Finding]:
    """The first of PROGRAMS that cannot be imported: what comes after it fails for the same reason."""
    for name in PROGRAMS:
        try:
            import_module(name)
        except Exception as error:  # a library that is torn raises anything from OSError to SystemError
            yield Finding(name, f"cannot be imported ({first_line(error)})", ANEW)
            return
