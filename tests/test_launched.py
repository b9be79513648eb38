"""Two processes under torch's launcher: what a signal to the launcher, and its death, do to a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import tiny
from forked import ticks

from train_t2i.checkpoint import RunFolder
from train_t2i.errors import EXIT_PREEMPTED

ROOT = Path(__file__).resolve().parents[1]
STEPS = 400  # far more than there is time for; a step takes two ticks
FLAGS = f"--batch-size 1 --max-train-steps {STEPS} --auto-resume --hang-seconds 60"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread_before_a_fork")]


def processes_of(run: Path) -> list[int]:
    """The pids whose command line names the run's folder."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(run.parent).encode() in words:
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_stopped_or_killed_leaves_a_saved_run_and_no_orphan(trainer, number):
    """A signal is passed on; a killed launcher passes nothing on, and is missed."""
    run = trainer.root / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "train_t2i", *trainer.arguments("run", FLAGS)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
    }  # fmt: skip
    output = trainer.root / "launcher.out"
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 300
        while ticks(run) < 3:
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.05)
        process.send_signal(number)
        end = time.monotonic() + 60
        while processes_of(run):
            process.poll()
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
        for pid in processes_of(run):
            os.kill(pid, signal.SIGKILL)
    assert (run / ".exit_code").read_text() == f"{EXIT_PREEMPTED}\n"
    (step,) = RunFolder(run).steps()
    assert 2 <= step < STEPS
    more = f"--max-train-steps {step + 2} --checkpoint-steps {step + 1}"
    again = [
        forked.train_world(trainer.arguments(n, f"{FLAGS} {more}"), trainer.root / f"{n}.out") for n in ("run", "whole")
    ]
    assert [child.ends(200) for children in again for child in children] == [0] * 4
    tiny.assert_same_checkpoint(trainer.root / "whole", run, step + 2)
    tiny.assert_same_logs(trainer.root / "whole", run)
