"""Two processes in two network namespaces, and the cable between them is cut: in a tick, in a save."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
from test_lost import FLAGS, HOST, assert_same_run, at_tick, in_save

from train_t2i.checkpoint import RunFolder
from train_t2i.errors import EXIT_HANG, EXIT_LOST

CABLE, ADDRESSES = "cable", ("10.77.0.1", "10.77.0.2")
HANG_S = 4
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread_before_a_fork")]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two namespaces with a cable between them; this process stays outside."""
    if not shutil.which("ip"):
        pytest.skip("no iproute2 here")
    first, second = names = (f"t2i-{os.getpid()}-0", f"t2i-{os.getpid()}-1")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)


def move_into(namespace: str) -> None:
    """This process's sockets are from now on those of the namespace."""
    with open(f"/run/netns/{namespace}") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), "setns")


CUTS = {"tick": (lambda act: at_tick(3, act), [1]), "save": (lambda act: in_save(9, act), [2, 1])}


@pytest.mark.parametrize("moment", CUTS)
def test_a_cut_cable_ends_both_sides_and_the_run_goes_on(trainer, namespaces, moment):
    arm, saved = CUTS[moment]
    reached, cut = trainer.root / "reached", trainer.root / "cut"

    def wait_for_the_cut() -> None:
        reached.touch()
        while not cut.exists():
            time.sleep(0.01)

    def start(name: str, more: str, before: Callable[[int], object]) -> list[forked.Child]:
        def join(rank: int) -> None:
            move_into(namespaces[rank])
            before(rank)

        arguments, output = trainer.arguments(name, f"{FLAGS} {more}"), trainer.root / f"{name}.out"
        return forked.train_world(arguments, output, 2, join, ADDRESSES[0], CABLE)

    def finish(name: str) -> Path:
        children = start(name, "", lambda rank: None)
        assert [child.ends(60) for child in children] == [0, 0], children[0].said()
        return trainer.root / name

    whole = finish("whole")
    children = start("run", f"--hang-seconds {HANG_S}", lambda rank: arm(wait_for_the_cut) if rank == 0 else None)
    forked.until(children[0], reached.exists)
    ip("-n", namespaces[1], "link", "set", CABLE, "down")
    cut.touch()
    begun = time.monotonic()
    codes = [child.ends(within_s=30) for child in children]
    assert time.monotonic() - begun < 2 * HANG_S + 5
    assert set(codes) <= {EXIT_HANG, EXIT_LOST}
    for rank, child in enumerate(children):
        said = child.said()
        assert f"rank {rank} on {HOST}" in said
        assert "Traceback" not in said
    run = RunFolder(trainer.root / "run")
    assert run.steps() == saved
    ip("-n", namespaces[1], "link", "set", CABLE, "up")
    assert_same_run(whole, finish("run"))
