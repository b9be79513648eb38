"""Runs on each node, sent there as source, before anything starts: looks, changes nothing, prints one line of JSON.

    python -I -c SOURCE ACTIVATED REQUEST        ACTIVATED: yes or no
    python probe.py marker TRAIN_SCRIPT FLAGS    for slurm.sh

Works from Python 3.6 up, since a node without its environment has only the system's.
"""

import glob
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

MARK = "train_t2i-probe "  # a login shell may print lines of its own
NEEDED = ("torch", "accelerate", "diffusers", "transformers", "peft", "yaml")
SOURCES = {"train_t2i": (".py",), "rewards": (".py",), "shapes": (".py",), "scripts": (".sh", ".py", ".yaml")}
REHEARSAL_S = 240  # the first one may make the environment


def digest_of(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            sha.update(block)
    return sha.hexdigest()[:16]


def checkout_of(script: str):
    """The checkout that holds the training script, or none."""
    parents = Path(script).resolve().parents
    return next((folder for folder in parents if (folder / "train_t2i" / "__init__.py").exists()), None)


def code_of(script: str) -> dict:
    """File -> digest: the sources of the checkout and the script itself."""
    found, root = {"TRAIN_SCRIPT": digest_of(Path(script))}, checkout_of(script)
    for package, endings in SOURCES.items() if root else ():
        for path in (root / package).rglob("*"):
            if path.suffix in endings:
                found[path.relative_to(root).as_posix()] = digest_of(path)
    return found


def data_of(path: Path):
    """Size and digest of a file; of a folder, of its table, and the names and sizes of what is in it."""
    if path.is_file():
        return {"bytes": path.stat().st_size, "digest": digest_of(path)}
    if not path.is_dir():
        return None
    entries = sorted((f.relative_to(path).as_posix(), f.stat().st_size) for f in path.rglob("*") if f.is_file())
    sha = hashlib.sha256(json.dumps(entries).encode())
    table = path / "metadata.csv"
    if table.is_file():
        sha.update(digest_of(table).encode())
    return {"bytes": sum(size for _, size in entries), "digest": sha.hexdigest()[:16]}


def data_named(text: str):
    """The same of all that --data-path-train names (train_t2i/prompts.py); a dataset of the hub is not looked at."""
    if text.startswith("hub:"):
        return {"bytes": 0, "digest": text}
    names = [text]
    if not Path(text).exists():
        parts = [part.strip() for part in text.split(",") if part.strip()]
        names = [name for part in parts for name in (sorted(glob.glob(part, recursive=True)) or [part])]  # noqa: PTH207 - absolute ones too
    found = [data_of(Path(name)) for name in names]
    if len(found) == 1 or not all(found):
        return found[0] if len(found) == 1 else None
    digests = "".join(part["digest"] for part in found)
    return {
        "bytes": sum(part["bytes"] for part in found),
        "digest": hashlib.sha256(digests.encode()).hexdigest()[:16],
    }


def rehearse(script: str, flags: list, variables: dict):
    """What train would be given: the script with --dry-run, for one process.  Only for a script of the checkout."""
    root = checkout_of(script)
    if root is None or root / "scripts" not in Path(script).resolve().parents:
        return None
    environment = dict(os.environ, **variables)
    environment.update(NUM_MACHINES="1", NUM_PROCESSES="1")
    # the script's last line starts the trainer, whose --dry-run prints the settings as YAML
    done = subprocess.Popen(
        ["bash", "--", script, *flags, "--dry-run"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment, universal_newlines=True, errors="replace",
    )  # fmt: skip
    try:
        out, err = done.communicate(timeout=REHEARSAL_S)
    except subprocess.TimeoutExpired:
        done.kill()
        return {"said": f"not done after {REHEARSAL_S} s", "settings": None}
    if done.returncode:
        lines = [line for line in err.splitlines() if line.startswith("error:")] or err.splitlines() or ["no message"]
        return {"said": lines[-1], "settings": None}
    import yaml  # the environment has it: the script has just used it

    return {"said": "", "settings": yaml.safe_load(out)}


def gpus() -> int:
    """Those that CUDA_VISIBLE_DEVICES leaves visible."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        devices = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return devices.index("-1") if "-1" in devices else len([name for name in devices if name])
    if not shutil.which("nvidia-smi"):
        return 0
    done = subprocess.Popen(["nvidia-smi", "--list-gpus"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.communicate()[0].count(b"GPU ")


def port_problem(port: int) -> str:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last run's, in TIME_WAIT, is no obstacle
        try:
            server.bind(("", port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def address_problem(host: str) -> str:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        return str(error)
    return ""


def look(request: dict) -> dict:
    found: dict = {"clock": time.time(), "python": list(sys.version_info[:2]), "gpus": gpus()}
    found["missing"] = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    found["address"] = address_problem(request["master"])
    found["port"] = port_problem(request["port"]) if request["port"] else ""
    found["folder"] = Path(request["dir"]).is_dir()
    found["script"] = Path(request["dir"], request["script"]).is_file()
    found["code"] = found["data"] = found["rehearsal"] = None
    if found["script"]:
        os.chdir(request["dir"])
        found["code"] = code_of(request["script"])
        found["data_path"] = request["data"]
        if not found["missing"] and found["python"] >= [3, 11]:
            found["rehearsal"] = rehearse(request["script"], request["flags"], request["variables"])
        settings = (found["rehearsal"] or {}).get("settings")
        if settings:
            found["data_path"] = settings["data_path_train"]
        if found["data_path"]:
            found["data"] = data_named(found["data_path"])
    return found


def print_marker(script: str, flags: list) -> int:
    """For slurm.sh: the file in which the trainer says how it ended; an empty line where nobody knows."""
    found = rehearse(script, flags, {})
    if found and found["said"]:
        print(found["said"], file=sys.stderr)
        return 2
    print(marker_of(found["settings"]) if found else "")
    return 0


def marker_of(settings: dict) -> Path:
    return Path(settings["output_dir"], settings["exp_name"], ".exit_code")


if __name__ == "__main__":
    if sys.argv[1] == "marker":
        sys.exit(print_marker(sys.argv[2], sys.argv[3:]))
    print(MARK + json.dumps(dict(look(json.loads(sys.argv[2])), activated=sys.argv[1] == "yes")))
