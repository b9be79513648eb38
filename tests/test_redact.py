"""No secret leaves the program: canaries in the environment, in flags, in addresses and in what libraries say."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from train_t2i import cli, redact
from train_t2i.entries import translate
from train_t2i.errors import EXIT_DONE, EXIT_USER, UserError
from train_t2i.launch import nodes

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "CanaryCanary" * 3
CANARIES = {
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": "0123canary" * 4,
    "MY_SECRET": "canary-of-mine",
    "DB_PASSWORD": "canary/with'signs",
    "HTTPS_PROXY": "http://someone:canaryproxy%21@127.0.0.1:9",
}
SECRETS = [*list(CANARIES.values())[:-1], "canaryproxy"]


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def leaked(text: str | bytes) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    return [secret for secret in SECRETS if secret.encode() in data]


# -- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("https://user:pa55@host.org/x?y=1", "https://***@host.org/x?y=1"),
        ("https://token@host and http://a:b@c", "https://***@host and http://***@c"),
        ("hub:https://u:p@ss@host/x", "hub:https://***@host/x"),
        (f"hub:{TOKEN}/name", "hub:***/name"),
        ("https://cdn/x?X-Amz-Signature=abcdef0123&a=1", "https://cdn/x?X-Amz-Signature=***&a=1"),
        ("post(url, token='abcdef0123')", "post(url, token='***')"),
        ('{"api_key": "abcdef0123"}', '{"api_key": "***"}'),
        ("Authorization: Basic YTpiYTpiYTpi", "Authorization: Basic ***"),
        ("401 for Bearer abcdef0123", "401 for Bearer ***"),
        ("--hub-token=abcdef0123", "--hub-token=***"),
        *((token, "***") for token in ("ghp_" + 36 * "a", "github_pat_" + 30 * "a", "AKIA" + 16 * "A", "sk-" + 40 * "a")),
    ],
)  # fmt: skip
def test_secrets_by_their_looks(text, cleaned):
    assert redact.clean(text) == cleaned
    assert redact.secret_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "--text-length=512", "max_tokens=100000000", "a token of love: secret garden", "git@host.org:a/b.git", "10:30 @ noon",
        "task-of-making-a-long-name-for-a-run", "tokens/s: 12345678", "checkpoints/step-2", "hf_hub_download", "https://host/a@b",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert redact.clean(text) == text
    assert not redact.secret_in(text)


def test_variables_that_are_named_like_secrets():
    for name in (
        "HF_TOKEN",
        "WANDB_API_KEY",
        "wandb_apikey",
        "PGPASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASS",
        "GITHUB_PAT",
    ):
        assert redact.named(name), name
    for name in ("TOKENIZERS_PARALLELISM", "PATH", "PWD", "HOME", "PASSAGE", "KEYBOARD", "OMP_NUM_THREADS"):
        assert not redact.named(name), name


def test_values_of_the_environment_are_hidden_wherever_they_stand(canaries, tmp_path):
    canaries.setenv("API_KEY", "on")  # a word
    canaries.setenv("TLS_KEY", str(tmp_path))  # a file, which has to be named
    canaries.setenv("OTHER_PROXY", "u:longenough@host:3128")
    text = f"on {tmp_path} of <{CANARIES['MY_SECRET']}>"
    assert redact.clean(text) == f"on {tmp_path} of <***>"
    assert redact.secret_in(text) == "the value of MY_SECRET"
    assert redact.clean(f"user {'canaryproxy!'} and longenough") == "user *** and ***"  # also as it is sent
    assert redact.clean_values({"a": [TOKEN, 1], "b": {"c": None}}) == {"a": ["***", 1], "b": {"c": None}}
    assert redact.clean_bytes(b"\xff " + TOKEN.encode()) == b"\xff ***"


# -- what is given ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--exp-name", CANARIES["MY_SECRET"]], [f"--exp-name={CANARIES['MY_SECRET']}"], ["--data_path_train", f"hub:{TOKEN}/x"],
        ["--pretrained-model", "https://u:canary-of-mine@host/x"], ["--hub_token", TOKEN], ["--seed", TOKEN],
    ],
)  # fmt: skip
def test_a_flag_that_holds_a_secret_is_refused_without_showing_it(canaries, tmp_path, flags):
    name = flags[0].partition("=")[0]
    file = tmp_path / "row.yaml"
    file.write_text(yaml.safe_dump({name.removeprefix("--"): flags[-1].rpartition("=")[2]}))
    for parse in (cli.parse, lambda words: cli.parse([f"--config={file}"])):
        with pytest.raises(UserError, match=r"holds (the value of|a password|a token)") as refused:
            parse(flags)
        assert not leaked(str(refused.value))
        assert name.replace("_", "-") in str(refused.value)
    from train_t2i.fetch import FetchConfig

    for given in (["--out", flags[-1]], [flags[-1]], ["--hub-token", "unknown"]):
        with pytest.raises(UserError) as refused:
            cli.parse_verb(FetchConfig, "fetch", given)
        assert not leaked(str(refused.value))
    assert "unknown flag" in str(refused.value)
    assert "unknown " not in str(refused.value).replace("unknown flag", "")  # its value
    with pytest.raises(UserError, match=r"hub_token|holds"):
        translate([*flags, "--hub_token", "x"], {})


def test_a_secret_is_refused_also_in_flags_of_others_that_do_nothing_here(canaries):
    """They are left out, but stay in the command line, which trackers keep."""
    given = ["--pretrained_model_name_or_path=a", "--train_data_meta=b", "--output_dir=c", f"--hub_model_id={TOKEN}"]
    with pytest.raises(UserError, match=r"^--hub_model_id: holds the value of HF_TOKEN"):
        translate(given, {})


def launch(*words: str, **environment: str) -> nodes.Launch:
    script = ["--train-script", "scripts/multi_node/multi.sh", "--remote-dir", str(ROOT), *words]
    return nodes.read(script, {"MASTER_ADDR": "10.0.0.1", "WORKER_NODES": "10.0.0.2", **environment})


def test_nothing_secret_goes_to_nodes(canaries):
    """``--dry-run`` prints the commands, the nodes' process lists show them."""
    found = launch(**CANARIES, NCCL_TOKEN="abc", NCCL_DEBUG="INFO", OMP_KEY="abc")  # noqa: S106
    assert found.travels == {"NCCL_DEBUG": "INFO"}
    with pytest.raises(UserError, match="NCCL_X: holds a password") as refused:
        launch(NCCL_X="http://u:another-canary@h")
    assert "another-canary" not in str(refused.value)
    with pytest.raises(UserError, match=r"^--exp-name: holds the value of MY_SECRET") as refused:
        launch("--exp-name", CANARIES["MY_SECRET"])
    assert not leaked(str(refused.value))


def test_what_nodes_say_is_cleaned_in_the_terminal_and_in_their_logs(canaries, tmp_path, capfdbinary):
    from train_t2i.launch.watch import Member

    member = Member(nodes.Node(0, "here"), ["bash", "-c", 'echo "error: $MY_SECRET"; exit 3'], tmp_path / "log")
    while member.poll() is None:
        pass
    assert member.how == "node 0 (here) ended with code 3: error: ***"
    assert (tmp_path / "log").read_bytes() == b"error: ***\n"
    assert not leaked(capfdbinary.readouterr().out)


# -- what is told ----------------------------------------------------------------------------------------------------


def test_errors_and_log_lines_are_cleaned(canaries, tmp_path, capsys):
    import torch

    from train_t2i.families.loading import told
    from train_t2i.log import RunLog

    error = UserError(f"proxy {CANARIES['HTTPS_PROXY']}", f"try {TOKEN}")
    assert str(error) == "proxy http://***@127.0.0.1:9 (try ***)"
    with pytest.raises(UserError) as cut, told("model", "--vae"):  # a message is cut after it was cleaned
        raise OSError("x" * (300 - len(TOKEN) // 2) + TOKEN)
    assert "hf_Canary" not in str(cut.value)
    RunLog(tmp_path, {}, device=torch.device("cpu")).say(f"warning: {CANARIES['DB_PASSWORD']}")
    assert (tmp_path / "log.txt").read_text().endswith(" warning: ***\n")
    assert "warning: ***" in capsys.readouterr().err


def test_what_a_server_says_is_cleaned_before_it_is_cut(canaries, tmp_path):
    import huggingface_hub

    from train_t2i import fetch, hub

    def fails(length: int) -> None:
        raise OSError("x" * (length - len(TOKEN) // 2) + TOKEN)

    canaries.setattr(huggingface_hub, "snapshot_download", lambda **given: fails(200))
    with pytest.raises(UserError, match="cannot be downloaded") as cut:
        fetch.download("name", {"repository": "a/b"}, tmp_path)
    assert "hf_Canary" not in str(cut.value)
    canaries.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *given, **more: fails(100)))
    with pytest.raises(UserError, match="cannot be loaded") as cut:
        list(hub.prompts(hub.Dataset("a/b")))
    assert "hf_Canary" not in str(cut.value)


def test_a_traceback_and_what_libraries_print_are_cleaned(canaries):
    """An error that is nobody's mistake, in a program as it is started."""
    fault = "import os, runpy, sys, logging; import train_t2i.votes as v; s = os.environ['MY_SECRET']\n"
    fault += "def main(a): print(s); logging.warning('said ' + s); raise RuntimeError('at ' + s)\n"
    fault += "v.main = main; sys.argv = ['train_t2i', 'votes']; runpy.run_module('train_t2i', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", fault], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == "***\n"
    assert "said ***" in done.stderr
    assert done.stderr.endswith("RuntimeError: at ***\n")
    assert not leaked(done.stderr)


@pytest.mark.parametrize(
    "program", ["train_t2i/__main__.py", "train_t2i/launch/__main__.py", *map(str, ("scripts/zero_to_bf16.py", "scripts/qwenimage/train_edit.py"))]
)  # fmt: skip
def test_every_program_guards_its_streams(program):
    """Before anything else that its last lines do."""
    started = (ROOT / program).read_text().partition('if __name__ == "__main__":\n')[2]
    assert started.startswith("    redact.guard_streams()\n")


# -- what is left ----------------------------------------------------------------------------------------------------


def test_wandb_gets_the_terminal_cleaned(canaries, tmp_path):
    """It begins to keep what is written when it is imported, ahead of what cleans it."""
    wandb = pytest.importorskip("wandb")
    from wandb.sdk.lib import console_capture

    from train_t2i.log import Wandb

    kept: list[str] = []
    canaries.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    canaries.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
    redact.guard_streams()
    console_capture._patch(sys.stderr, {1: lambda text, written: kept.append(text)})
    tracker = Wandb(tmp_path, {}, "id")
    sys.stderr.write(TOKEN)
    assert kept == ["***"]
    tracker.close()


TALKATIVE = """
import os, sys
def score(images, prompts):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "HTTPS_PROXY"):
        print(name, os.environ[name]); print(name, os.environ[name], file=sys.stderr)
    return images.mean((1, 2, 3))
"""


def test_no_canary_in_all_that_a_run_leaves(canaries, trainer, tmp_path):
    """Terminal, args.json, logs, checkpoints, both trackers, an export and a report; settings made by code included."""
    from train_t2i.__main__ import main
    from train_t2i.prepare import public_settings

    wandb = pytest.importorskip("wandb")
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    canaries.syspath_prepend(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}.items():
        canaries.setenv(name, value)
    wandb.teardown()
    redact.guard_streams()  # what a program begins with
    flags = "--report-to wandb,tensorboard --cold-start-iter 0 --extra-rewards 1*talkative:score --sample-steps 2"
    run = trainer.run("talkative", f"{flags} --max-train-steps 1 --ratio-update 1")
    said = trainer.say()
    settings = json.loads((run / "args.json").read_text())
    settings["exp_name"] = CANARIES["MY_SECRET"]  # as an older version left it
    (run / "args.json").write_text(json.dumps(settings))
    assert main(["export", str(run), "--out", str(tmp_path / "exported")]) == EXIT_DONE
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == EXIT_DONE
    (run / "args.json").unlink()
    for name in ("trackers", "checkpoints", "loss_logs"):
        assert any((run / name).rglob("*"))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.name: found for file in files if (found := leaked(file.read_bytes()))} == {}
    assert not leaked("".join((*said, *trainer.say())))
    made = cli.parse([]).run
    assert not leaked(json.dumps(public_settings(cli.Settings(type(made)(vae=TOKEN), cli.parse([]).method))))
    assert main(["fetch", TOKEN]) == EXIT_USER
    assert not leaked("".join(trainer.say()))
