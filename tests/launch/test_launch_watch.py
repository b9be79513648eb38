"""Whole launches of two fake nodes: output, codes, and how everything ends when something does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_nodes import Fake, alive, ended, until

# a node: writes its pid, waits, and on SIGTERM does what the test says
WAITS = """
trap "echo asked >>asked-$MACHINE_RANK; {on_term}" TERM
echo $$ >pid-$MACHINE_RANK
while true; do sleep 0.05; done
"""
SAVES = "sleep 1; touch saved-$MACHINE_RANK; exit 75"


def waiting(fake: Fake, on_term: str, **variables: str) -> tuple[subprocess.Popen[str], list[int]]:
    fake.script(WAITS.format(on_term=on_term))
    launcher = fake.start(**variables)
    return launcher, fake.pids(["pid-0", "pid-1"])


def nobody(pids: list[int]) -> bool:
    return not any(map(alive, pids))


def ssh_of(pid: int) -> int:
    """The ssh client (ours: the shell that it became) above a worker's command."""
    while True:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if b"train_t2i.launch" in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0"):
            return pid
        pid = parent


def test_nodes_run_with_their_rank_and_say_so_in_one_place(fake: Fake) -> None:
    fake.script('echo "rank $MACHINE_RANK of $NUM_MACHINES, $MASTER_ADDR:$MASTER_PORT, $NUM_PROCESSES, $*"; printf end')
    assert fake.run("--batch-size", "2", NUM_PROCESSES="3", MASTER_PORT="29123") == 0, fake.err
    for rank, host in enumerate(["localhost", "worker"]):
        lines = [line for line in fake.out.splitlines() if line.startswith(f"[{rank} {host}] ")]
        told = f"rank {rank} of 2, localhost:29123, 3, --batch-size 2"
        assert lines == [f"[{rank} {host}] {told}", f"[{rank} {host}] end"]
        assert (fake.root / "logs" / f"node-{rank}.log").read_text() == f"{told}\nend"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_node_stops_the_others_and_is_named(fake: Fake, rank: int) -> None:
    fake.script(
        f"[ $MACHINE_RANK != {rank} ] || {{ echo 'error: no luck'; echo later; exit 3; }}\n"
        + WAITS.format(on_term="exit 1")
    )
    begun = time.monotonic()
    assert fake.run() == 3
    assert time.monotonic() - begun < 30
    host = ["localhost", "worker"][rank]
    assert f"node {rank} ({host}) ended with code 3: error: no luck" in fake.err
    assert nobody(fake.pids([f"pid-{1 - rank}"]))
    assert (fake.folder / f"asked-{1 - rank}").exists()


@pytest.mark.slow
def test_a_node_that_ignores_the_stop_is_killed_within_30_s(fake: Fake) -> None:
    fake.script("[ $MACHINE_RANK = 0 ] || { sleep 1; exit 3; }\n" + WAITS.format(on_term=""))
    begun = time.monotonic()
    assert fake.run() == 3
    assert time.monotonic() - begun < 30
    assert nobody(fake.pids(["pid-0"]))


@pytest.mark.slow
def test_a_connection_that_hangs_does_not_hold_the_launcher(fake: Fake) -> None:
    fake.script("exit 3")
    begun = time.monotonic()
    assert fake.run(WORKER_NODES="hung") == 3
    assert time.monotonic() - begun < 30
    assert "node 0 (localhost) ended with code 3; stopping the others" in fake.err


def test_a_node_that_fails_for_want_of_another_is_not_blamed(fake: Fake) -> None:
    """torch's launcher tells of a process that was killed; the other node only sees a connection close."""
    fake.script(
        "if [ $MACHINE_RANK = 0 ]; then echo 'RuntimeError: Connection closed by peer'; exit 1; fi\n"
        "if [ $MACHINE_RANK = 1 ]; then sleep 0.7; echo '  traceback : Signal 9 (SIGKILL) received by PID 7'; exit 1; fi\n"
        + WAITS.format(on_term="exit 1")
    )
    assert fake.run(WORKER_NODES="worker third") == 1
    told = [line for line in fake.err.splitlines() if "ended with code 1" in line]
    assert told[0].startswith("launch: node 1 (worker) ended with code 1: traceback : Signal 9 (SIGKILL)")
    assert any("node 0 (localhost)" in line and "Connection closed by peer" in line for line in told)


def test_a_killed_ssh_client_is_a_lost_connection_and_ends_both_sides(fake: Fake) -> None:
    """With a real sshd the same, in test_launch_ssh.py; there the far side is another process tree."""
    launcher, pids = waiting(fake, "exit 1")
    os.kill(ssh_of(pids[1]), signal.SIGKILL)
    assert ended(launcher) == 137
    assert "node 1 (worker) lost its connection" in fake.err
    until(lambda: nobody(pids))


def test_a_signal_lets_every_node_save(fake: Fake) -> None:
    launcher, pids = waiting(fake, SAVES)
    launcher.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)  # `timeout` signals the process and its group
    assert ended(launcher) == 75, fake.err
    assert "SIGTERM" in fake.err
    assert "from now" not in fake.err  # not a second signal
    assert nobody(pids)
    for rank in (0, 1):
        assert (fake.folder / f"saved-{rank}").exists()
        assert (fake.folder / f"asked-{rank}").read_text() == "asked\n"


def test_ctrl_z_does_not_put_the_launcher_to_sleep() -> None:
    """Its nodes would miss it."""
    from train_t2i.launch import watch

    before = signal.getsignal(signal.SIGTSTP)
    with watch.Signals():
        assert signal.getsignal(signal.SIGTSTP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTSTP) == before


def test_the_time_to_save_ends(fake: Fake) -> None:
    launcher, pids = waiting(fake, "", SAVE_GRACE="1")
    launcher.send_signal(signal.SIGINT)
    assert ended(launcher, 20) == 130
    assert nobody(pids)


def test_a_second_signal_shortens_it(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 s in the product; the deadline itself is what counts here."""
    from train_t2i.launch import watch

    now, sent = [100.0], []

    class Member:
        code, stopped = None, False

        def send(self, byte: bytes) -> None:
            sent.append((now[0], byte))

        def poll(self) -> int | None:
            self.code = 1 if (sent and sent[-1][1] == b"k") else None
            return self.code

    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 1))
    signals = watch.Signals()
    signals.count, signals.last = 2, signal.SIGTERM
    seen = watch.Watch([Member()], 600, signals)
    seen.run()
    acts = [(at, byte) for at, byte in sent if byte != b"."]
    assert [byte for _, byte in acts] == [b"t", b"k"]
    assert acts[1][0] - acts[0][0] == pytest.approx(30, abs=3)


def test_a_killed_launcher_leaves_nothing(fake: Fake) -> None:
    launcher, pids = waiting(fake, "exit 1")
    launcher.kill()
    launcher.wait()
    until(lambda: nobody(pids))
    assert (fake.folder / "asked-1").exists()


def test_a_launcher_killed_while_nodes_save_lets_them(fake: Fake) -> None:
    launcher, pids = waiting(fake, "seq 100000; " + SAVES)  # more than a pipe holds
    launcher.send_signal(signal.SIGTERM)
    until(lambda: (fake.folder / "asked-0").exists() and (fake.folder / "asked-1").exists())
    launcher.kill()
    launcher.wait()
    until(lambda: nobody(pids))
    assert (fake.folder / "saved-0").exists()
    assert (fake.folder / "saved-1").exists()


def test_a_reader_that_is_gone_is_no_reason_to_stop(fake: Fake) -> None:
    fake.script("sleep 1; for i in $(seq 2000); do echo line $i; done; touch done-$MACHINE_RANK")
    launcher = subprocess.Popen(
        ["bash", "-c", '"$@" | head -n 1', "x", "env", *[f"{k}={v}" for k, v in fake.variables.items()],
         f"PATH={fake.root / 'bin'}:{os.environ['PATH']}", "bash", str(Path(__file__).parents[2] / "scripts/multi_node/multi.sh")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert ended(launcher) == 0
    assert len((fake.root / "logs" / "node-1.log").read_text().splitlines()) == 2000
    assert (fake.folder / "done-0").exists()
    assert (fake.folder / "done-1").exists()
