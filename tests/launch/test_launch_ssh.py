"""Real launches through real sshd, on loopback addresses and in a network namespace: training, and how a launch ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from fake_nodes import ROOT, Fake, alive, ended, until
from plain_lines import FLAGS, TINY, plain_lines
from sshd import Servers, free_port, key, serve, servers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WAITS = """
trap "echo asked >>asked-$MACHINE_RANK; {on_term}" TERM
echo $$ >pid-$MACHINE_RANK
while true; do sleep 0.05; done
"""


@pytest.fixture(scope="module")
def reach(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with servers(tmp_path_factory.mktemp("ssh")) as made:
        yield made


@pytest.fixture
def world(fake: Fake, reach: Servers) -> Fake:
    """The nodes of the fake world behind real servers."""
    (fake.root / "bin" / "ssh").unlink()
    fake.variables |= {"MASTER_ADDR": "127.0.0.1", "WORKER_NODES": "127.0.0.2", "SSH_OPTIONS": reach.options}
    return fake


def left(folder: Path) -> list[int]:
    """Processes that still run in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str((entry / "cwd").readlink()).startswith(str(folder)) and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def clients(launcher: subprocess.Popen[str]) -> list[int]:
    """The ssh clients of a launcher."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid and (entry / "comm").read_text().strip() == "ssh":
                found.append(int(entry.name))
    return found


# -- how a launch ends -----------------------------------------------------------------------------------------------


def waiting(world: Fake, on_term: str, **variables: str) -> tuple[subprocess.Popen[str], list[int]]:
    world.script(WAITS.format(on_term=on_term))
    launcher = world.start(**variables)
    return launcher, world.pids(["pid-0", "pid-1"])


def test_a_killed_ssh_client_leaves_no_orphan(world: Fake) -> None:
    launcher, pids = waiting(world, "exit 1")
    (client,) = clients(launcher)
    os.kill(client, signal.SIGKILL)
    killed = time.monotonic()
    assert ended(launcher) == 137
    until(lambda: not any(map(alive, pids)), 30 - (time.monotonic() - killed))
    assert "node 1 (127.0.0.2) lost its connection" in world.err
    assert (world.folder / "asked-1").exists()


def test_a_killed_launcher_leaves_no_orphan(world: Fake) -> None:
    launcher, pids = waiting(world, "exit 1")
    launcher.kill()
    launcher.wait()
    until(lambda: not any(map(alive, pids)))
    until(lambda: not left(world.folder))


def test_a_stop_reaches_every_node_once_and_lets_it_save(world: Fake) -> None:
    launcher, pids = waiting(world, "sleep 1; touch saved-$MACHINE_RANK; exit 75")
    os.killpg(launcher.pid, signal.SIGINT)  # a terminal's Ctrl-C: the ssh clients are not in the group
    assert ended(launcher) == 75, world.err
    assert not any(map(alive, pids))
    for rank in (0, 1):
        assert (world.folder / f"asked-{rank}").read_text() == "asked\n"
        assert (world.folder / f"saved-{rank}").exists()


def test_an_unknown_host_key_is_a_problem_and_no_question(world: Fake, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    world.script("touch started")
    options = f"{world.variables['SSH_OPTIONS']} -o UserKnownHostsFile={tmp_path}/empty"
    assert world.run(SSH_OPTIONS=options) == 2
    assert "Host key verification failed" in world.err
    assert not (world.folder / "started").exists()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def far_node(world: Fake, tmp_path: Path) -> Iterator[str]:
    """A worker behind a cable that can be cut: a network namespace; yields the near end."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    name = f"t{os.getpid() % 100000}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    near, far, net = f"{name}a", f"{name}b", "10.213.77"
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        ip("addr", "add", f"{net}.1/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", name, "addr", "add", f"{net}.2/30", "dev", far)
        ip("-n", name, "link", "set", far, "up")
        ip("-n", name, "link", "set", "lo", "up")
        keys = tmp_path / "keys"
        keys.mkdir()
        key(keys, "client")
        with serve(keys, f"{net}.2", 2222, ["ip", "netns", "exec", name]) as config:
            world.variables |= {"MASTER_ADDR": f"{net}.1", "WORKER_NODES": f"{net}.2", "SSH_OPTIONS": f"-F {config}"}
            yield near
    finally:
        ip("netns", "del", name)


def test_a_cut_network_ends_both_sides_within_30_s(world: Fake, far_node: str) -> None:
    """Nobody closes the connection: the master's ssh misses its answers, the node misses the master's beats."""
    launcher, pids = waiting(world, "exit 1")
    ip("link", "set", far_node, "down")
    cut = time.monotonic()
    assert ended(launcher) != 0
    seconds = time.monotonic() - cut
    assert "lost its connection" in world.err
    until(lambda: not any(map(alive, pids)), 35 - seconds)
    print(f"launcher ended after {seconds:.1f} s, the nodes after {time.monotonic() - cut:.1f} s")
    assert seconds < 30
    assert time.monotonic() - cut < 32


# -- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(world: Fake) -> Fake:
    """Two nodes of one process that share a folder, on the scripts of this checkout."""
    (world.folder / "scripts").symlink_to(ROOT / "scripts")
    world.variables |= TINY | {"TRAIN_SCRIPT": "scripts/multi_node/cold_start_sdxl_4step.sh"}
    return world


def test_cold_start_and_rewards_on_two_nodes_as_by_hand(training: Fake) -> None:
    """The launcher, and plain torchrun lines: the same weights, optimizers and logs."""
    runs = training.folder / "runs"
    assert ended(training.start(*FLAGS, "--max-train-steps", "2"), 300) == 0, training.err
    cold = runs / "cold_start_sdxl_4step"
    plain_lines(training.folder, "by-hand", *FLAGS, "--max-train-steps", "2")
    tiny.assert_same_checkpoint(cold, runs / "by-hand", 2)
    tiny.assert_same_logs(cold, runs / "by-hand")
    record = cold / "checkpoints" / "torch_units" / "step-2.pt"
    flags = ["--resume-ckpt", str(record), "--max-train-steps", "3", "--cold-start-iter", "2", *FLAGS]
    script = "scripts/multi_node/dmdr_sdxl_4step_refl.sh"
    assert ended(training.start(*flags, TRAIN_SCRIPT=script), 300) == 0, training.err
    (line,) = tiny.log_lines(runs / "dmdr_sdxl_4step_refl", "generator")
    assert line["step"] == 3
    assert "clip" in " ".join(line)
    assert not left(training.root)


def ticks(run: Path) -> int:
    return len(tiny.log_lines(run, "guidance")) if (run / "loss_logs").exists() else 0


def trainer_of(rank: int, folder: Path) -> int:
    """The training process of a node."""
    for pid in left(folder):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"MACHINE_RANK={rank}".encode() in variables and any(v.startswith(b"LOCAL_RANK=") for v in variables):
            return pid
    raise AssertionError(f"node {rank} runs no trainer")


def test_a_killed_worker_and_a_stop_then_the_same_command_goes_on(training: Fake) -> None:
    run = training.folder / "runs" / "cold_start_sdxl_4step"
    flags = [*FLAGS, "--max-train-steps", "5000", "--cold-start-iter", "5000", "--ratio-update", "2", "--auto-resume"]
    flags[flags.index("--checkpoint-steps") + 1] = "1"
    launcher = training.start(*flags)
    until(lambda: launcher.poll() is not None or ticks(run) >= 4, 240)
    assert launcher.poll() is None, training.err
    os.kill(trainer_of(1, training.root), signal.SIGKILL)
    killed = time.monotonic()
    assert ended(launcher) not in (0, 75)
    print(f"ended {time.monotonic() - killed:.1f} s after the kill")
    assert time.monotonic() - killed < 30
    assert "node 1 (127.0.0.2) ended with code" in training.err, training.err
    assert "SIGKILL" in training.err
    assert not left(training.root)

    before = ticks(run)
    launcher = training.start(*flags, MASTER_PORT=str(free_port()))
    until(lambda: launcher.poll() is not None or ticks(run) >= before + 2, 240)
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher, 120) == 75, training.err + training.out[-3000:]
    assert (run / ".exit_code").read_text() == "75\n"
    assert "stopped by a signal" in (run / "log.txt").read_text()
    assert "going on from" in (run / "log.txt").read_text()
    assert not left(training.root)
