"""Nothing that a user gives is interpreted by a shell: fuzzed through real shells, values compared byte for byte."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_nodes import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train_t2i.errors import UserError
from train_t2i.launch import command, nodes, preflight

ATTACKS = [
    "'", '"', "''", "a'b\"c", "$(touch CANARY)", "`touch CANARY`", "; touch CANARY;", "&& touch CANARY", "|touch CANARY",
    "\ntouch CANARY\n", "> CANARY", "${PATH}", "$'\\n'", "~", "*", "?[a-z]*", "{a,b}", "!!", "\\", "\\'", "#", "-x", "--", "-o",
    "--dry_run=", " ", "", "\t", "é漢🙂", "\udcff", "a\rb", "=", "(", ")", "<(touch CANARY)", "\x7f", "%s%n",
]  # fmt: skip
SHELLS = ("sh", "bash", "dash")
words = st.one_of(
    st.sampled_from(ATTACKS),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    st.lists(st.sampled_from(ATTACKS), min_size=2, max_size=4).map("".join),
)
names = words.filter(lambda word: word not in ("", ".", "..")).map(lambda word: word.replace("/", "_")[:40])
SCRIPT = 'printf "%s\\0" "$@" >"$NCCL_OUT/flags"; env -0 >"$NCCL_OUT/variables"; pwd >"$NCCL_OUT/folder"\n'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


def launch_of(place: Path, number: int, folder: str, script: str, flags: list[str], values: list[str]) -> nodes.Launch:
    """Folder, activate script and training script with any names."""
    here = place / f"{number}"
    out, inside = here / "out", here / folder
    for made in (out, inside):
        made.mkdir(parents=True)
    (inside / script).write_text(SCRIPT)
    (inside / f"activate{script}").write_text(f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n")
    environment = {f"NCCL_V{i}": value for i, value in enumerate(values)} | {"NCCL_OUT": str(out)}
    launch = nodes.read(
        [],
        environment | {
            "MASTER_ADDR": "master", "WORKER_NODES": "worker", "REMOTE_DIR": str(inside), "TRAIN_SCRIPT": script,
            "SOURCE_DIR": f"activate{script}", "ACCELERATE_USE_CPU": "1",
        },
    )  # fmt: skip
    # flags of train may hold any words; those of the launcher are taken out when they are read
    return nodes.Launch(**{**vars(launch), "flags": tuple(flags)})


def run_there(shell: str, argv: list[str], cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """What sshd does: the login shell gets the words joined."""
    assert argv[0] == "ssh"
    remote = argv[argv.index("--") + 2 :]
    assert len(remote) == 1
    process = subprocess.Popen(
        [shell, "-c", remote[0]], cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:  # its input stays open while it runs: the supervisor would stop otherwise
        out, err = process.stdout.read(), process.stderr.read()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


COUNT = iter(range(10**6))


@settings(max_examples=45, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    folder=names,
    script=names,
    flags=st.lists(words, min_size=8, max_size=12),
    values=st.lists(words, min_size=4, max_size=6),
)
def test_every_value_arrives_as_it_was(
    place: Path, folder: str, script: str, flags: list[str], values: list[str]
) -> None:
    """45 launches of about 24 values, the shells in turn."""
    number = next(COUNT)
    launch = launch_of(place, number, folder, script, flags, values)
    argv = command.argv(launch, launch.nodes[1], command.supervised(launch, 1))
    done = run_there(SHELLS[number % len(SHELLS)], argv, place)
    assert done.returncode == 0, done.stderr
    out = place / str(number) / "out"
    assert (out / "flags").read_bytes() == b"".join(os.fsencode(flag) + b"\0" for flag in flags)
    variables = (out / "variables").read_bytes().split(b"\0")
    for i, value in enumerate(values):
        assert os.fsencode(f"NCCL_V{i}={value}") in variables
    assert (out / "folder").read_bytes() == os.fsencode(f"{place / str(number) / folder}\n")
    assert not [path for path in place.rglob("*") if path.name == "CANARY"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    folder=names,
    script=names,
    flags=st.lists(words, min_size=4, max_size=8),
    values=st.lists(words, min_size=2, max_size=4),
)
def test_the_pre_flight_finds_what_has_any_name(
    place: Path, folder: str, script: str, flags: list[str], values: list[str]
) -> None:
    number = next(COUNT)
    launch = launch_of(place, number, folder, script, flags, values)
    done = run_there(SHELLS[number % len(SHELLS)], preflight.question(launch, launch.nodes[1]), place)
    answer = preflight.answer_of(done.stdout)
    assert answer, done.stderr
    assert answer["folder"]
    assert answer["script"]
    assert answer["activated"]
    assert not [path for path in place.rglob("*") if path.name == "CANARY"]


@pytest.mark.parametrize(("folder", "activate"), [("-P", "activate"), ("a b", "-x"), ("plain", "ls")])
def test_a_folder_and_a_script_are_never_options_or_programs(folder: str, activate: str, tmp_path: Path) -> None:
    """bash would look for a bare name in PATH."""
    (tmp_path / folder).mkdir()
    (tmp_path / folder / activate).write_text("touch activated\n")
    launch = nodes.Launch(**{**vars(read()), "remote_dir": folder, "source_dir": activate})
    subprocess.run(["bash", "-c", command.enter(launch)], cwd=tmp_path, check=True)
    assert (tmp_path / folder / "activated").exists()


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(words, words.map(lambda word: f"host{word}"), words.map(lambda word: f"user@host{word}")))
def test_a_host_is_a_plain_name_or_refused(text: str) -> None:
    try:
        found = nodes.nodes_of("master", [text], "")
    except UserError:
        return
    assert text in (found[1].host, f"{found[1].user}@{found[1].host}")
    assert found[1].host.isascii()
    assert found[1].host[0].isalnum()
    assert all(c.isalnum() or c in "._:-" for c in found[1].host)


@settings(max_examples=200, deadline=None)
@given(flags=st.lists(words, max_size=6))
def test_flags_of_train_pass_unchanged(flags: list[str]) -> None:
    """All but the words that are ours; a word that could be ours is given as --flag=WORD."""
    given_flags = [f"--magic-prompt={flag}" for flag in flags]
    assert read(*given_flags).flags == tuple(given_flags)


def read(*arguments: str, **variables: str) -> nodes.Launch:
    return nodes.read(arguments, {"MASTER_ADDR": "a", "WORKER_NODES": "b c"} | variables)


@pytest.mark.parametrize(
    "arguments",
    [["--batch-size", "2"], ["--a", "x y", "--b=-1", "-c"], ["word", "--", "--dry"], ["--dry", "--mast", "x"]],
)
def test_unknown_words_go_to_train_in_their_order(arguments: list[str]) -> None:
    assert read(*arguments).flags == tuple(arguments)


def test_an_env_file_is_read_and_never_run(tmp_path: Path) -> None:
    file = tmp_path / "cluster.env"
    file.write_text(
        "# a cluster\n\nMASTER_ADDR=10.0.0.1\nexport WORKER_NODES='10.0.0.2 user@10.0.0.3'\nNCCL_DEBUG=\"$(touch CANARY) #\"\n"
        "MASTER_PORT=29511\nSSH_USER=me\n"
    )
    launch = nodes.read(["--env-file", str(file), "--master_port", "29513"], {"MASTER_PORT": "29512", "SSH_USER": ""})
    assert [(node.host, node.user) for node in launch.nodes] == [
        ("10.0.0.1", "me"), ("10.0.0.2", "me"), ("10.0.0.3", "user"),
    ]  # fmt: skip
    assert launch.travels["NCCL_DEBUG"] == "$(touch CANARY) #"
    assert launch.master_port == 29513  # flag > environment > file
    assert nodes.read(["--env-file", str(file)], {"MASTER_PORT": "29512"}).master_port == 29512
    assert nodes.read(["--env-file", str(file)], {}).master_port == 29511
    assert not list(tmp_path.glob("CANARY"))


@pytest.mark.parametrize("line", ["WANDB_API_KEY=1", "NCCL_TOKEN=1", "HF_TOKEN=1", "PATH=/x", "a line", "MASTER_ADR=x"])
def test_an_env_file_with_another_line_is_refused(line: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.env"
    file.write_text(f"MASTER_ADDR=a\n{line}\n")
    with pytest.raises(UserError, match="line 2") as caught:
        nodes.read(["--env-file", str(file)], {})
    assert "=1" not in str(caught.value)


def test_what_travels_and_what_stays() -> None:
    travel = {
        "NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
        "BACKEND": "fsdp2", "TINY": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    stay = {
        "WANDB_API_KEY": "s", "HF_TOKEN": "s", "NCCL_API_KEY": "s", "AWS_SECRET_ACCESS_KEY": "s", "TINY2": "s", "XNCCL_A": "s",
        "NCCL_A;b": "s", "OMP_PASSWORD": "s", "LEARNING_RATE_GEN": "s",
    }  # fmt: skip
    launch = read(**travel, **stay)
    assert launch.travels == travel
    assert read("--backend", "zero2", **travel).travels["BACKEND"] == "zero2"


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"MASTER_PORT": "0"}, "MASTER_PORT"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT"),
        ({"NUM_PROCESSES": "8; x"}, "NUM_PROCESSES"),
        ({"SAVE_GRACE": "-1"}, "SAVE_GRACE"),
        ({"SSH_PORT": "-oProxyCommand=x"}, "SSH_PORT"),
        ({"SSH_USER": "-l"}, "SSH_USER"),
        ({"SSH_OPTIONS": "-o 'x"}, "SSH_OPTIONS"),
        ({"WORKER_NODES": "b -oProxyCommand=x"}, "-oProxyCommand=x"),
        ({"WORKER_NODES": "b b"}, "both node 1 and node 2"),
        ({"MASTER_ADDR": "me@a"}, "me@a"),
        ({"TRAIN_SCRIPT": "none.sh"}, "none.sh"),
    ],
)
def test_a_wrong_setting_is_named(variables: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        read(**variables)


def test_ssh_gets_the_host_after_the_options() -> None:
    launch = read("--user", "me", "--ssh-port", "2222", "--ssh-options", "-i 'a key' -o ServerAliveInterval=9")
    argv = command.argv(launch, launch.nodes[1], "true")
    assert argv[-3:] == ["--", "b", "exec bash -c true"]
    assert argv[argv.index("-i") + 1] == "a key"
    assert [argv[argv.index(flag) + 1] for flag in ("-l", "-p")] == ["me", "2222"]
    options = [word for i, word in enumerate(argv) if argv[i - 1] == "-o"]
    assert options[0] == "BatchMode=yes"
    assert options.index("ServerAliveInterval=9") < options.index("ServerAliveInterval=5")  # ssh takes the first


def test_more_than_a_command_line_holds_is_refused() -> None:
    launch = read("--magic-prompt", "x" * 130_000)
    with pytest.raises(UserError, match="too long"):
        command.argv(launch, launch.nodes[1], command.supervised(launch, 1))


def test_the_launcher_needs_no_package(tmp_path: Path) -> None:
    """-S: the standard library alone."""
    code = "import sys, runpy; sys.argv[1:] = sys.argv[1:]; runpy.run_module('train_t2i.launch', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, "--help"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--worker-nodes" in done.stdout
