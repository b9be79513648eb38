"""The cache verb: what a folder holds, going on with a stopped one, and what is refused."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from caches import FakeText, files_of, left_by_a_dead_process
from safetensors.torch import load_file

from train_t2i import build, cache, storage
from train_t2i.__main__ import main
from train_t2i.errors import EXIT_DISK, EXIT_DONE, EXIT_LOCKED, EXIT_PREEMPTED, EXIT_USER, UserError
from train_t2i.families import load_family
from train_t2i.families.base import Cond
from train_t2i.mapped import replacing
from train_t2i.prompt_cache import PromptCache

FLAGS = "--mixed-precision no --shard-size 8 --batch-size 3"
Make = Callable[..., tuple[int, str]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """20 different prompts, two of them twice."""
    path = tmp_path / "prompts.txt"
    lines = [f"a {c} circle number {i}" for i, c in zip(range(20), ["red", "blue"] * 10)]
    path.write_text("\n".join([*lines[:5], lines[2], *lines[5:], lines[0]]) + "\n")
    return path


@pytest.fixture
def make(sdxl_folder, prompts, models_from_memory, capsys, monkeypatch) -> Make:
    """(folder, more flags) -> (exit code, what was said)."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def run(out: Path, more: str = "", rank: int = 0, world: int = 1) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        common = f"cache --out {out} --pretrained-model {sdxl_folder} --data-path-train {prompts}"
        code = main(shlex.split(f"{common} {FLAGS} {more}"))
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture
def whole(make: Make, tmp_path: Path) -> Path:
    code, said = make(tmp_path / "whole")
    assert code == EXIT_DONE, said
    return tmp_path / "whole"


def one_line(ended: tuple[int, str], *words: str, code: int = EXIT_USER) -> None:
    assert ended[0] == code, ended
    assert "Traceback" not in ended[1]
    told = ended[1][ended[1].index("error: ") :]
    assert len(told.splitlines()) <= 2
    assert all(word in told for word in words), told


# -- what it holds ---------------------------------------------------------------------------------------------------


def test_every_embedding_is_the_encoders_own(whole: Path, sdxl_folder: Path, prompts: Path) -> None:
    """Bit for bit, in the order of the file; of a text that comes twice there is one."""
    family, stored, lines = load_family("sdxl", str(sdxl_folder)), PromptCache(whole), prompts.read_text().splitlines()
    assert (len(stored), stored.unique) == (22, 20)
    different = list(dict.fromkeys(lines))
    made = {}
    for shard in range(0, 20, 8):
        for first in range(shard, min(shard + 8, 20), 3):
            texts = different[first : min(first + 3, shard + 8)]
            cond = family.encode(texts)
            made |= {text: (cond.tokens[i], cond.pooled[i]) for i, text in enumerate(texts)}
    for row, line in enumerate(lines):
        for found in (stored[row], stored.embedding(line)):
            assert torch.equal(found[0], made[line][0])
            assert torch.equal(found[1], made[line][1])
            assert found[0].dtype == torch.float32
    empty = family.encode([""], "")
    for found, cond in ((stored.embedding(""), empty), (stored.negative(), empty.negative)):
        assert torch.equal(found[0], cond.tokens[0])
        assert torch.equal(found[1], cond.pooled[0])
    assert not stored.negative()[0].any()  # SDXL's
    with pytest.raises(IndexError):
        stored[22]


def test_the_files_are_safetensors(whole: Path) -> None:
    shards = [load_file(whole / f"shard-0000{i}.safetensors") for i in range(3)]
    assert [len(shard["lengths"]) for shard in shards] == [8, 8, 4]
    assert all(int(shard["offsets"][-1]) == len(shard["payload"]) for shard in shards)
    index = load_file(whole / "index.safetensors")
    assert index["samples"].tolist() == [0, 1, 2, 3, 4, 2, *range(5, 20), 0]
    assert sorted(index["entries"].tolist()) == list(range(20))
    assert {path.name for path in whole.iterdir()} == {
        *(f"shard-0000{i}.safetensors" for i in range(3)), "index.safetensors", "empty.safetensors", "cache.json", ".lock",
    }  # fmt: skip


def test_only_the_last_prompts_are_taken(make: Make, prompts: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "out", "--max-size 5")[0] == EXIT_DONE
    stored, lines = PromptCache(tmp_path / "out"), prompts.read_text().splitlines()
    assert len(stored) == 5
    assert [stored.find(line) is not None for line in lines[-5:]] == [True] * 5
    assert stored.find(lines[5]) is None
    assert make(tmp_path / "more", "--max-size 500")[0] == EXIT_DONE
    assert len(PromptCache(tmp_path / "more")) == 22


def test_the_folder_that_is_written_by_default() -> None:
    assert str(cache.default_out("flux")) == "data/t2i_prompts_3m/preproc_flux"
    assert str(cache.default_out("qwen_image")) == "data/t2i_prompts_3m/preproc_qwen"


def fake(monkeypatch: pytest.MonkeyPatch, family: FakeText) -> FakeText:
    monkeypatch.setattr(build, "build_family", lambda run, dtype: family)
    return family


@pytest.mark.parametrize("masks", [True, False])
def test_padding_is_stored_only_where_it_is_attended_to(make, tmp_path, monkeypatch, prompts, masks) -> None:
    prompts.write_text("a\nabcdefg\nabcdefghijklmnopqrstuvw\n")
    family = fake(monkeypatch, FakeText(masks=masks, pooled=0 if masks else 5, guidance=None if masks else 3.5))
    assert make(tmp_path / "out")[0] == EXIT_DONE
    stored = PromptCache(tmp_path / "out")
    assert [len(stored[i][0]) for i in range(3)] == ([2, 8, 16] if masks else [16, 16, 16])
    assert torch.equal(stored[1][0][:8], family.row("abcdefg"))
    assert (stored[0][1] is None) == masks


# -- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_makes_the_same_files(make: Make, whole: Path, tmp_path: Path, world: int) -> None:
    """Each makes some of the shards, whatever the others do, in any order."""
    said = [make(tmp_path / "out", rank=rank, world=world) for rank in reversed(range(world))]
    assert [code for code, _ in said] == [EXIT_DONE] * world
    assert files_of(tmp_path / "out") == files_of(whole)
    assert "process 1 of" in said[-2][1]
    assert "22 prompts, 20 different" in said[-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_of_a_launcher_make_the_same_files(whole, prompts, sdxl_folder, tmp_path, world) -> None:
    """By torchrun, all at once."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        "-m",
        "train_t2i",
    ]
    flags = f"cache --out {tmp_path / 'out'} --pretrained-model {sdxl_folder} --data-path-train {prompts} {FLAGS}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [*command, *flags.split()], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "22 prompts, 20 different" in done.stdout
    assert files_of(tmp_path / "out") == files_of(whole)


def test_a_process_makes_its_own_shards_alone(make: Make, tmp_path: Path) -> None:
    assert make(tmp_path / "out", rank=1, world=2)[0] == EXIT_DONE
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-00001.safetensors"]
    with pytest.raises(UserError, match=r"not a prompt cache"):
        PromptCache(tmp_path / "out")
    assert make(tmp_path / "out", rank=0, world=4)[0] == EXIT_DONE
    with pytest.raises(UserError, match=r"not complete, shard-00002.safetensors is missing"):
        PromptCache(tmp_path / "out")


# -- going on --------------------------------------------------------------------------------------------------------


def killed_at(make: Make, out: Path, name: str, nth: int) -> int:
    """Run in a child that kills itself, as kill -9 would, at the ``nth`` operation of that name; what it ended with."""
    child = os.fork()
    if child == 0:
        count = iter(range(1, 1000))

        def before(operation: str, path: Path) -> None:
            if operation == name and next(count) == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        storage.before = before
        make(out)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(
    ("name", "nth"), [("write", 1), ("rename", 1), ("write", 2), ("rename", 3), ("rename", 4), ("sync", 8)]
)
def test_a_killed_run_goes_on_with_the_same_command(make, whole, tmp_path, one_thread_before_a_fork, name, nth) -> None:
    """Whatever was written when it came: the files of an unbroken run, and what was finished is not made again."""
    out = tmp_path / "out"
    assert killed_at(make, out, name, nth) == signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert make(out)[0] == EXIT_DONE
    assert files_of(out) == files_of(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done


def test_a_run_that_is_killed_in_the_middle_of_a_shard_leaves_no_half_of_it(
    make, whole, tmp_path, monkeypatch, one_thread_before_a_fork
) -> None:
    out, write = tmp_path / "out", cache.write_rows
    batches = iter(range(100))

    def stop(*arguments):
        if next(batches) == 6:  # the empty prompts twice, the first shard in three batches, one of the second
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(cache, "write_rows", stop)
        one_line(make(out), "stopped", "the same command goes on", code=EXIT_PREEMPTED)
    assert {path.name for path in out.iterdir()} == {
        ".lock", "cache.json", "empty.safetensors", "index.safetensors", "shard-00000.safetensors",
    }  # fmt: skip
    left_by_a_dead_process(out / "shard-00001.safetensors")
    assert len(list(out.glob(".*.tmp"))) == 1
    assert make(out)[0] == EXIT_DONE
    assert files_of(out) == files_of(whole)


def test_what_is_missing_is_made_again_and_nothing_else(make, whole, monkeypatch) -> None:
    before = files_of(whole)
    (whole / "shard-00001.safetensors").unlink()
    (whole / "empty.safetensors").unlink()
    rows, write = [], cache.write_shard
    monkeypatch.setattr(cache, "write_shard", lambda job, shard, *rest: (rows.append(shard), write(job, shard, *rest)))
    assert make(whole)[0] == EXIT_DONE
    assert rows == [1]
    assert files_of(whole) == before


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--store bf16", "store: then 'native', now 'bf16'"),
        ("--batch-size 4", "batch_size: then 3, now 4"),
        ("--shard-size 7", "shard_size: then 8, now 7"),
        ("--mixed-precision bf16", "dtype: then 'float32', now 'bfloat16'"),
        ("--max-size 21", "max_size: then 0, now 21"),
    ],
)
def test_a_folder_is_not_gone_on_with_under_other_settings(make: Make, whole: Path, more: str, told: str) -> None:
    before = files_of(whole)
    one_line(make(whole, more), "begun with other settings or prompts", told)
    assert files_of(whole) == before


def test_nor_with_other_prompts_or_encoders(make, whole, prompts, sdxl_folder_3) -> None:
    before = files_of(whole)
    one_line(make(whole, f"--pretrained-model {sdxl_folder_3}"), "encoder: then ")
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    one_line(make(whole), "digest: then ")
    assert files_of(whole) == before
    one_line(make(whole, rank=1, world=2), "digest: then ")  # each process sees to it


def test_two_launches_in_one_folder(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    held = storage.take_lock(tmp_path / "out" / ".lock")
    try:
        one_line(make(tmp_path / "out"), "in use by another run", "choose another --out", code=EXIT_LOCKED)
    finally:
        storage.release_lock(held)


def test_the_other_processes_of_a_launch_that_is_refused_disturb_nobody(make, whole, tmp_path) -> None:
    """They hold no lock, and may be at the shard that the first launch is at."""
    out, shard = tmp_path / "out", (whole / "shard-00001.safetensors").read_bytes()
    out.mkdir()
    with replacing(out / "shard-00001.safetensors") as first:
        first.write(shard[:100])
        assert make(out, rank=1, world=2)[0] == EXIT_DONE
        first.write(shard[100:])
    assert make(out)[0] == EXIT_DONE
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize("operation", ["write", "rename", "mkdir"])
def test_a_full_disk_is_one_line(make, whole, tmp_path, monkeypatch, operation) -> None:
    def full(name: str, path: Path) -> None:
        if name == operation and ("shard-00001" in path.name or name == "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(storage, "before", full)
        one_line(make(tmp_path / "out"), "cannot be written (No space left", "run the same command", code=EXIT_DISK)
    assert not list(tmp_path.glob("out/.*.tmp"))
    assert make(tmp_path / "out")[0] == EXIT_DONE
    assert files_of(tmp_path / "out") == files_of(whole)


def test_no_room_for_the_index_is_one_line(make, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    one_line(make(tmp_path / "out"), "the index of 22 prompts", "TMPDIR", code=EXIT_DISK)


def test_a_disk_that_will_not_hold_it_is_told_early(make, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda path: 10_000)
    code, said = make(tmp_path / "out")
    assert code == EXIT_DONE
    assert len(re.findall(r"warning: about [\d.]+ \wB are still to come, 10.0 kB are free", said)) == 1


def test_a_number_that_is_not_finite_is_not_kept(make, tmp_path, monkeypatch) -> None:
    family = fake(monkeypatch, FakeText(masks=True))
    encode = family.encode

    def broken(prompts: list[str], negative: str | None = None) -> Cond:
        cond = encode(prompts, negative)
        if "a blue circle number 9" in prompts:
            cond.tokens[prompts.index("a blue circle number 9"), 3, 1] = float("inf")
        return cond

    family.encode = broken  # type: ignore[method-assign]
    one_line(make(tmp_path / "out"), "not finite for 'a blue circle number 9'", "--mixed-precision")
    assert not (tmp_path / "out" / "shard-00001.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--text-length 50", "--text-length does nothing for sdxl"),
        ("--store fp4", "--store"), ("--batch-size 0", "--batch-size 0"), ("--shard-size 0", "--shard-size 0"),
        ("--max-size -1", "--max-size -1"), ("--family sd9", "--family"), ("--data-path-train none.txt", "none.txt"),
    ],
)  # fmt: skip
def test_wrong_flags_are_one_line(make: Make, tmp_path: Path, more: str, told: str) -> None:
    one_line(make(tmp_path / "out", more), told)
    assert not (tmp_path / "out" / "cache.json").exists()


def test_a_folder_that_cannot_be_made_is_one_line(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one_line(make(tmp_path / "file" / "out"), "cannot be written")


def test_copies_of_a_folder_are_as_good(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    assert torch.equal(PromptCache(tmp_path / "copy")[3][0], PromptCache(whole)[3][0])
