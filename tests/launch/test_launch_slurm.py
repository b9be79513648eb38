"""slurm.sh on a real cluster of two nodes: ranks, preemption, the time limit, a cancelled job."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from fake_nodes import ROOT, Fake, until
from plain_lines import FLAGS, TINY, plain_lines
from slurm_cluster import Cluster, cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SLURM = ROOT / "scripts" / "multi_node" / "slurm.sh"
# Stands for a launcher and its trainer: settings for --dry-run; else 10 ticks a life, and a checkpoint when it is stopped.
SCRIPT = """
case " $* " in *" --dry-run "*) printf 'output_dir: runs\\nexp_name: a\\ndata_path_train: p\\n'; exit;; esac
mkdir -p runs/a
echo "$MACHINE_RANK $NUM_MACHINES $NUM_PROCESSES $MASTER_ADDR:$MASTER_PORT $*" >>runs/a/started
trap 'sleep 1; [ $MACHINE_RANK != 0 ] || echo 75 >runs/a/.exit_code; exit 1' TERM
[ ! -e runs/a/finish ] || { [ $MACHINE_RANK != 0 ] || echo 0 >runs/a/.exit_code; exit 0; }
while true; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose launcher is the stand-in."""
    (tmp_path / "train_t2i" / "launch").mkdir(parents=True)
    (tmp_path / "train_t2i" / "__init__.py").touch()
    shutil.copy(ROOT / "train_t2i" / "launch" / "probe.py", tmp_path / "train_t2i" / "launch")
    (tmp_path / "scripts" / "multi_node").mkdir(parents=True)
    (tmp_path / "scripts" / "multi_node" / "run.sh").write_text(SCRIPT)
    (tmp_path / "activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    return tmp_path


def submit(slurm: Cluster, checkout: Path, *flags: str, options: tuple[str, ...] = ()) -> str:
    variables = {
        "TRAIN_SCRIPT": "scripts/multi_node/run.sh",
        "SOURCE_DIR": str(checkout / "activate"),
        "NUM_PROCESSES": "1",
    }
    return slurm.submit(checkout, SLURM, list(options), *flags, **variables)


def starts(checkout: Path) -> list[str]:
    file = checkout / "runs" / "a" / "started"
    return sorted(file.read_text().splitlines()) if file.exists() else []


def running(checkout: Path, lives: int = 1) -> None:
    until(lambda: len(starts(checkout)) == 2 * lives, 60)


def finish(checkout: Path) -> None:
    """From now on the stand-in ends well."""
    (checkout / "runs" / "a" / "finish").touch()


def test_every_node_gets_its_rank_and_the_flags_as_they_are(slurm: Cluster, checkout: Path) -> None:
    (checkout / "runs" / "a").mkdir(parents=True)
    finish(checkout)
    job = submit(slurm, checkout, "--magic-prompt", "it's; $(touch CANARY) *")
    assert slurm.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", (checkout / f"job-{job}.log").read_text()
    host = slurm.config.read_text().partition("NodeName=")[2].split()[0]
    port = 20000 + int(job) % 20000
    assert starts(checkout) == [
        f"{rank} 2 1 {host}:{port} --auto-resume --magic-prompt it's; $(touch CANARY) *" for rank in (0, 1)
    ]
    assert not list(checkout.rglob("CANARY"))


def test_a_signal_before_the_time_limit_saves_and_queues_again(slurm: Cluster, checkout: Path) -> None:
    """What --signal=B:TERM@600 does, sent by hand."""
    job = submit(slurm, checkout)
    running(checkout)
    slurm.call("scancel", "--signal", "TERM", "--batch", job)
    until(lambda: int(slurm.job(job)["Restarts"]) == 1)
    finish(checkout)
    assert slurm.wait(job, "COMPLETED", "FAILED", seconds=120)["JobState"] == "COMPLETED"
    assert len(starts(checkout)) == 4
    assert "queued again" in (checkout / f"job-{job}.log").read_text()


def test_a_preempted_job_saves_and_goes_on_after_the_other(slurm: Cluster, checkout: Path) -> None:
    job = submit(slurm, checkout, options=("--exclusive",))
    running(checkout)
    finish(checkout)
    (checkout / "other.sh").write_text("#!/bin/bash\nexec srun sleep 1\n")
    other = slurm.submit(checkout, checkout / "other.sh", ["--partition", "high", "--exclusive"])
    assert slurm.wait(other, "COMPLETED", "FAILED", seconds=120)["JobState"] == "COMPLETED"
    assert slurm.wait(job, "COMPLETED", "FAILED", seconds=120)["JobState"] == "COMPLETED"
    assert slurm.job(job)["Restarts"] == "1"
    assert len(starts(checkout)) == 4


def test_a_cancelled_job_stays_cancelled(slurm: Cluster, checkout: Path) -> None:
    job = submit(slurm, checkout)
    running(checkout)
    slurm.call("scancel", job)
    until(lambda: slurm.job(job)["JobState"] == "CANCELLED")
    until(lambda: (checkout / "runs" / "a" / ".exit_code").exists())
    until(lambda: slurm.call("squeue", "--noheader", "--jobs", job) == "")
    assert slurm.job(job)["Restarts"] == "0"
    assert len(starts(checkout)) == 2


def test_a_failure_is_the_jobs_and_is_not_repeated(slurm: Cluster, checkout: Path) -> None:
    script = SCRIPT.replace(
        "while true", "[ $MACHINE_RANK != 0 ] || { echo 4 >runs/a/.exit_code; exit 1; }\nwhile true"
    )
    (checkout / "scripts" / "multi_node" / "run.sh").write_text(script)
    job = submit(slurm, checkout)
    found = slurm.wait(job, "FAILED", "COMPLETED")
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "4:0", "0")


def test_a_wrong_flag_ends_the_job_before_anything_starts(slurm: Cluster, checkout: Path) -> None:
    script = "echo 'error: --x: unknown flag' >&2; exit 2\n" + SCRIPT
    (checkout / "scripts" / "multi_node" / "run.sh").write_text(script)
    job = submit(slurm, checkout, "--x")
    assert slurm.wait(job, "FAILED", "COMPLETED")["ExitCode"] == "2:0"
    assert "error: --x: unknown flag" in (checkout / f"job-{job}.log").read_text()
    assert starts(checkout) == []


def test_training_under_slurm_is_the_run_by_hand(slurm: Cluster, fake: Fake) -> None:
    (fake.folder / "scripts").symlink_to(ROOT / "scripts")
    variables = TINY | {"SOURCE_DIR": str(fake.root / "activate"), "NUM_PROCESSES": "1", "VIRTUAL_ENV": sys.prefix}
    variables["TRAIN_SCRIPT"] = "scripts/multi_node/cold_start_sdxl_4step.sh"
    job = slurm.submit(fake.folder, SLURM, [], *FLAGS, "--max-train-steps", "2", **variables)
    state = slurm.wait(job, "COMPLETED", "FAILED", seconds=300)["JobState"]
    assert state == "COMPLETED", (fake.folder / f"job-{job}.log").read_text()[-3000:]
    plain_lines(fake.folder, "by-hand", *FLAGS, "--max-train-steps", "2")
    tiny.assert_same_checkpoint(fake.folder / "runs" / "cold_start_sdxl_4step", fake.folder / "runs" / "by-hand", 2)
