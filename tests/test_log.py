"""What trackers are given: the numbers of the loss logs, each tick once, also after a run was interrupted and resumed."""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from train_t2i.checkpoint import RunFolder
from train_t2i.errors import EXIT_USER

PREFIXES = {"generator": "gen", "guidance": "gui"}
FLAGS = "--batch-size 1 --max-train-steps 4 --checkpoint-steps 1 --sample-steps 2 --batch-size-test 1"
TICKS = range(1, 9)  # two a step
SHEETS = [0, 4, 8]


@pytest.fixture
def killed_and_resumed(trainer):
    """(tracker, step) -> the folder of a run that was killed at its end, when ``step`` was its last checkpoint."""

    def make(tracker: str, step: int) -> Path:
        flags = f"{FLAGS} --report-to jsonl,{tracker}"
        whole = trainer.run("whole", flags)
        shutil.copytree(whole, whole.with_name("resumed"), symlinks=True)
        for later in RunFolder(whole.with_name("resumed")).steps():
            if later > step:
                RunFolder(whole.with_name("resumed")).record(later).unlink()
        return trainer.run("resumed", f"{flags} --resume-ckpt latest")

    return make


def logged(root: Path) -> Counter:
    """(name, tick, value) of every number in the loss logs of a run, in the precision of trackers."""
    found: Counter = Counter()
    for role, prefix in PREFIXES.items():
        for text in (root / "loss_logs" / f"loss_{prefix}_log.jsonl").read_text().splitlines():
            line = json.loads(text)
            tick = line.pop("tick")
            values = {key: value for key, value in line.items() if isinstance(value, float)}
            found.update((f"{role}/{key}", tick, single(value)) for key, value in values.items())
    return found


def single(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


# -- tensorboard -----------------------------------------------------------------------------------------------------


def shown(root: Path) -> tuple[Counter, list[int]]:
    """What tensorboard shows of a run: (name, tick, value) of its numbers, the ticks of its images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "trackers" / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    numbers = Counter((name, event.step, event.value) for name in tags["scalars"] for event in events.Scalars(name))
    return numbers, [event.step for name in tags["images"] for event in events.Images(name)]


@pytest.mark.parametrize("step", [1, 2])  # 2 has sample images, 1 has none
def test_tensorboard_shows_the_loss_logs_after_a_resume(killed_and_resumed, step):
    run = killed_and_resumed("tensorboard", step)
    for root in (run.with_name("whole"), run):
        numbers, sheets = shown(root)
        assert sorted({tick for _, tick, _ in numbers}) == [*TICKS]
        assert numbers == logged(root)
        assert sheets == SHEETS


def test_tensorboard_forgets_an_attempt_that_saved_nothing(trainer):
    first = trainer.run("first", f"{FLAGS} --max-train-steps 3 --report-to tensorboard")
    shutil.copytree(first / "trackers", trainer.root / "again" / "trackers")
    again = trainer.run("again", f"{FLAGS} --max-train-steps 2 --auto-resume --report-to tensorboard")
    numbers, sheets = shown(again)
    assert numbers == logged(again)
    assert sheets == [0, 4]


def test_tensorboard_begins_a_stage_at_its_ticks(trainer):
    first = trainer.run("first", f"{FLAGS} --max-train-steps 2")
    start = f"--resume-ckpt {RunFolder(first).record(2)} --report-to tensorboard"
    numbers, sheets = shown(second := trainer.run("second", f"{FLAGS} {start}"))
    assert numbers == logged(second)
    assert sheets == [4, 8]


# -- wandb -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_offline(monkeypatch, tmp_path):
    """No account, no network."""
    import wandb

    for name in ("WANDB_API_KEY", "NETRC", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()  # it remembers the variables of its first use
    yield monkeypatch
    wandb.teardown()


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log: blocks of 32 KiB, chunks with a header of 7 bytes."""
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last chunk
            yield record
            record = b""


def history(folder: Path) -> tuple[Counter, list[int]]:
    """What an offline run keeps for wandb: (name, tick, value) of its numbers, the ticks of its images."""
    from wandb.proto.wandb_internal_pb2 import Record

    numbers: Counter = Counter()
    sheets = []
    (file,) = folder.glob("*.wandb")
    for content in records(file):
        items = Record.FromString(content).history.item
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        tick = row.get("_step")
        numbers.update((name, tick, single(row[name])) for name in row if name.split("/")[0] in PREFIXES)
        sheets += [tick] if any(name.split("/")[0] == "samples" for name in row) else []
    return numbers, sheets


def test_wandb_keeps_the_loss_logs_and_the_id_of_the_run(killed_and_resumed, wandb_offline):
    run = killed_and_resumed("wandb", 2)
    (run_id,) = {(root / "trackers" / "run_id").read_text() for root in (run, run.with_name("whole"))}
    first, second = sorted((run / "trackers" / "wandb").glob("offline-run-*"))  # their names begin with the time
    assert first.name.endswith(f"-{run_id}")
    assert second.name.endswith(f"-{run_id}")
    assert history(first) == (logged(run.with_name("whole")), SHEETS)
    later = Counter({entry: count for entry, count in logged(run).items() if entry[1] > 4})
    assert history(second) == (later, [8])


def netrc(folder: Path, host: str) -> None:
    (folder / ".netrc").write_text(f"machine {host} login user password {40 * 'a'}\n")
    (folder / ".netrc").chmod(0o600)


def test_a_key_is_one_of_the_wandb_service(wandb_offline, tmp_path):
    import wandb

    from train_t2i.log import has_wandb_key

    assert not has_wandb_key()
    netrc(tmp_path, "github.com")
    assert not has_wandb_key()
    netrc(tmp_path, "127.0.0.1:9")
    assert has_wandb_key()
    (tmp_path / ".netrc").write_text("garbage")
    assert not has_wandb_key()
    wandb_offline.setenv("WANDB_API_KEY", "secret")
    assert has_wandb_key()
    wandb_offline.delenv("WANDB_API_KEY")
    netrc(tmp_path, "api.wandb.ai")
    assert not has_wandb_key()
    wandb_offline.delenv("WANDB_BASE_URL")
    wandb.teardown()
    assert has_wandb_key()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WANDB_API_KEY", "short", "API key must have"),
        ("WANDB_MODE", "online", "wandb login"),
        ("WANDB_MODE", "nonsense", "nonsense"),
        ("WANDB_BASE_URL", "nonsense", "nonsense"),
    ],
)
def test_wandb_that_cannot_start_is_one_line(trainer, wandb_offline, name, value, said):
    wandb_offline.setenv(name, value)
    ended = trainer.ends("run", "--report-to wandb", "direct")
    assert ended.code == EXIT_USER
    told = ended.err[ended.err.index("error: --report-to wandb:") :]
    assert said in told
    assert "WANDB_MODE=offline" in told
    assert len(told.splitlines()) == 2
    assert "Traceback" not in ended.err
