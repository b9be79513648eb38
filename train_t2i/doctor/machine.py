"""The machine: memory, GPUs and their driver, the hub, and the disks that a run writes to."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train_t2i.doctor.findings import Finding, first_line

GB = 10**9
LEAST_FREE_BYTES = GB
MEMORY = Path("/proc/meminfo")
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of the container
DRIVER = Path("/proc/driver/nvidia/version")
NEWER_DRIVER = "install a newer driver, or the torch that this one serves: https://pytorch.org/get-started"


def gb(count: float) -> str:
    return f"{count / GB:.1f} GB"


# -- memory ----------------------------------------------------------------------------------------------------------


def memory_bytes() -> tuple[int, int]:
    """(all that this process may use, what of it is available)."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = available = page * os.sysconf("SC_PHYS_PAGES")
    if MEMORY.is_file():
        lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    if LIMIT.is_file() and (limit := LIMIT.read_text().strip()).isdecimal():
        total = min(total, int(limit))
    return total, min(total, available)


def memory() -> Iterator[Finding]:
    total, available = memory_bytes()
    yield Finding("memory", f"{gb(total)}, {gb(available)} available; {os.cpu_count()} cores")


# -- GPUs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Driver:
    """NVIDIA's: its version, or what its own tool says is wrong."""

    version: str = ""
    fault: str = ""


def driver() -> Driver | None:
    """None: there is none."""
    if shutil.which("nvidia-smi") is None:
        return Driver(fault="nvidia-smi is missing") if DRIVER.is_file() else None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(fault=first_line(error))
    said = (done.stdout.strip() or done.stderr.strip() or f"nvidia-smi ended with {done.returncode}").splitlines()[0]
    return Driver(fault=said) if done.returncode else Driver(version=said)


def gpus() -> Iterator[Finding]:
    """Each GPU that torch can use; a driver that it cannot use, and whatever torch warns of, is a problem."""
    import torch

    found = driver()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
        if usable:
            torch.cuda.init()  # says which GPUs are too old or too new for this torch
    said = [" ".join(str(warning.message).split()) for warning in caught]
    count = torch.cuda.device_count() if usable else 0
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    version = f", driver {found.version}" if found and found.version else ""
    yield Finding("devices", f"{count or 'no'} GPU{'s' * (count > 1)} for torch (built for {built}{version})")
    for index in range(count):
        about, free = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)[0]
        yield Finding(f"GPU {index}", f"{about.name}, {gb(about.total_memory)}, {gb(free)} free")
    if found and found.fault:
        yield Finding("driver", found.fault, "install NVIDIA's driver again, and start the machine anew")
    elif found and not usable:
        why = said[0] if said else "it was built without CUDA" if not torch.version.cuda else "it says not why"
        yield Finding("driver", f"{found.version}: torch cannot use the GPU here: {why}", NEWER_DRIVER)
    elif usable:
        yield from (Finding("devices", line, NEWER_DRIVER) for line in said)


def gpu_free_bytes() -> list[int]:
    import torch

    return (
        [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


# -- the hub and the disks -------------------------------------------------------------------------------------------


def hub() -> Iterator[Finding]:
    """Where downloads lie and whether there is a login; never the login."""
    from huggingface_hub import constants, get_token

    login = "logged in" if get_token() else "not logged in"
    proxies = sorted(name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy"))
    through = f", through {', '.join(proxies)}" if proxies else ""
    offline = ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    yield Finding("hub", f"{login}{offline}{through}; downloads in {constants.HF_HUB_CACHE}")


def disk(
    subject: str, folder: Path, needed_bytes: int = LEAST_FREE_BYTES, what: str = "a few files"
) -> Iterator[Finding]:
    """Whether ``folder``, or the nearest that is there, can be written, and has room for ``what``."""
    there = nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0")
    except OSError as error:
        yield Finding(subject, f"{folder}: cannot be written ({error.strerror})", "choose another folder, or make room")
        return
    free = shutil.disk_usage(there).free
    yield Finding(subject, f"{folder}: {gb(free)} free")
    if free < needed_bytes:
        way_out = "make room, or choose another disk"
        yield Finding(subject, f"{folder}: {gb(free)} free, and {what} takes {gb(needed_bytes)}", way_out)


def nearest(folder: Path) -> Path:
    """The folder itself, or its first parent that is there; a file in its place stays, and cannot be written into."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
