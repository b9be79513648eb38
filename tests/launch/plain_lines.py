"""A run on two nodes by hand: the torchrun lines of docs/multi_node.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fake_nodes import ROOT, ended
from sshd import free_port

TINY = {
    "TINY": "1",
    "ACCELERATE_USE_CPU": "true",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
FLAGS = ["--batch-size", "2", "--sample-steps", "0", "--checkpoint-steps", "0"]


def plain_lines(folder: Path, exp_name: str, *flags: str) -> None:
    """The settings of a launcher as a file, then torchrun on each node."""
    clean = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "PATH")}
    clean |= TINY | {"VIRTUAL_ENV": sys.prefix, "NUM_PROCESSES": "1", "PYTHONPATH": str(ROOT)}
    script = "scripts/single_node/cold_start_sdxl_4step.sh"
    rehearsed = subprocess.run(
        ["bash", script, "--dry-run", *flags], cwd=folder, env=clean, capture_output=True, text=True, check=True
    )
    (folder / "run.yaml").write_text(rehearsed.stdout)
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1",
             "--master-addr", "127.0.0.1", "--master-port", port, "-m", "train_t2i", "train", "--config", "run.yaml",
             "--exp-name", exp_name],
            cwd=folder, env=clean, stdout=subprocess.DEVNULL, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [ended(process, 300) for process in processes] == [0, 0]
