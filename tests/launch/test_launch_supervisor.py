"""The node's supervisor: it ends with the master's word or silence, and nothing of its command is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_nodes import ROOT, alive, until

SOURCE = ROOT / "train_t2i" / "launch" / "supervisor.py"
# writes its pid, then its grandchild's, which has a session of its own and ignores SIGTERM
STUBBORN = """
echo $$ >command
{python} -c 'import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid()
open("grandchild.part", "w").write(str(os.getpid())); os.rename("grandchild.part", "grandchild")
time.sleep(600)' &
trap "echo asked >>asked; {on_term}" TERM
touch ready
while true; do sleep 0.05; done
"""


class Supervised:
    """A supervisor with short graces, fed by the test."""

    def __init__(self, folder: Path, script: str, save: float = 30, stop: float = 1, silence: float = 30) -> None:
        self.folder = folder
        words = [
            sys.executable,
            "-I",
            "-c",
            SOURCE.read_text(),
            str(save),
            str(stop),
            str(silence),
            "bash",
            "-c",
            script,
        ]
        self.process = subprocess.Popen(words, cwd=folder, stdin=subprocess.PIPE)
        self.stdin = self.process.stdin
        assert self.stdin is not None

    def say(self, byte: bytes) -> None:
        self.stdin.write(byte)
        self.stdin.flush()

    def code(self, seconds: float = 20) -> int:
        try:
            return self.process.wait(timeout=seconds)
        finally:
            self.process.kill()
            self.process.wait()

    def pid(self, name: str) -> int:
        until(lambda: (self.folder / name).exists() and (self.folder / name).read_text().strip())
        return int((self.folder / name).read_text())

    def nothing_is_left(self) -> bool:
        return not alive(self.pid("command")) and not alive(self.pid("grandchild"))


def stubborn(folder: Path, on_term: str = "", **times: float) -> Supervised:
    made = Supervised(folder, STUBBORN.format(python=sys.executable, on_term=on_term), **times)
    made.pid("grandchild")
    until(lambda: (folder / "ready").exists())
    return made


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 3", 3), ("exit 75", 75), ("exit 255", 1), ("kill -KILL $$", 137)]
)
def test_the_exit_code_is_passed_on(script: str, code: int, tmp_path: Path) -> None:
    assert Supervised(tmp_path, script).code() == code


def test_the_end_of_the_input_ends_everything(tmp_path: Path) -> None:
    """SIGTERM to the command, a grace, SIGKILL, also to what has left its session."""
    supervised, begun = stubborn(tmp_path), time.monotonic()
    supervised.stdin.close()
    assert supervised.code() == 137
    assert time.monotonic() - begun > 0.9  # the grace
    assert (tmp_path / "asked").exists()
    assert supervised.nothing_is_left()


def test_silence_ends_everything(tmp_path: Path) -> None:
    """A network that is cut leaves the connection open: only the beats stop."""
    supervised = stubborn(tmp_path, silence=1)
    for _ in range(15):
        supervised.say(b".")
        time.sleep(0.1)
    assert supervised.process.poll() is None
    assert supervised.code() == 137
    assert supervised.nothing_is_left()


def test_a_stop_that_saves_outlives_the_connection(tmp_path: Path) -> None:
    supervised = stubborn(tmp_path, on_term="sleep 2; touch saved; exit 75", stop=0.5)
    supervised.say(b"t")
    until(lambda: (tmp_path / "asked").exists())
    supervised.stdin.close()
    assert supervised.code() == 75
    assert (tmp_path / "saved").exists()
    assert supervised.nothing_is_left()


def test_the_time_to_save_is_bounded(tmp_path: Path) -> None:
    supervised = stubborn(tmp_path, save=1)
    supervised.say(b"t")
    assert supervised.code() == 137
    assert supervised.nothing_is_left()


def test_a_kill_is_at_once(tmp_path: Path) -> None:
    supervised = stubborn(tmp_path, on_term="sleep 60", stop=600)
    supervised.say(b"t")
    until(lambda: (tmp_path / "asked").exists())
    supervised.say(b"k")
    assert supervised.code() == 137
    assert supervised.nothing_is_left()


def test_a_signal_to_the_supervisor_is_a_stop_that_saves(tmp_path: Path) -> None:
    """A node that shuts down signals every process; the command is asked once."""
    supervised = stubborn(tmp_path, on_term="exit 75")
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.code() == 75
    assert (tmp_path / "asked").read_text() == "asked\n"
    assert supervised.nothing_is_left()


def test_what_a_finished_command_left_is_ended(tmp_path: Path) -> None:
    script = STUBBORN.format(python=sys.executable, on_term="").partition("trap")[0]
    supervised = Supervised(tmp_path, script + "while [ ! -e grandchild ]; do sleep 0.05; done; exit 0")
    assert supervised.code() == 0
    assert supervised.nothing_is_left()


def test_the_command_hears_of_its_supervisors_death(tmp_path: Path) -> None:
    supervised = stubborn(tmp_path, on_term="exit 75")
    supervised.process.kill()
    until(lambda: not alive(supervised.pid("command")))
    assert (tmp_path / "asked").exists()
    supervised.process.wait()
    with_pid = supervised.pid("grandchild")
    assert alive(with_pid)  # nobody is left who could: a process in a session of its own has to see it by itself
    subprocess.run(["kill", "-KILL", str(with_pid)], check=True)
