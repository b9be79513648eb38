"""What a start of a run ran on: one line of ``environment.jsonl``, for its report.  No names of machines, no paths.

{"started", "tick", "code_version", "python", "system", "packages", "device", "num_processes", "backend"}
"""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from train_t2i import __version__

FILE = "environment.jsonl"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")


def environment(device: torch.device, num_processes: int, backend: str, tick: int) -> dict[str, Any]:
    """``tick``: of the run, that this start goes on from."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "tick": tick,
        "code_version": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "device": device_name(device),
        "num_processes": num_processes,
        "backend": backend,
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def device_name(device: torch.device) -> str:
    """Of the main process; a run's processes have one device each."""
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)}, {gib:.0f} GiB, CUDA {torch.version.cuda}"
    return f"{device.type.upper()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def note_start(root: Path, told: dict[str, Any]) -> None:
    """Add a line; the starts before it stay."""
    with open(root / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(told) + "\n")
