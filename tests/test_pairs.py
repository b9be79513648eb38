"""A pairs folder: what it holds, going on with a stopped one, and what is refused."""

from __future__ import annotations

import csv
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from train_t2i import pair_rendering, storage, student
from train_t2i.__main__ import main
from train_t2i.config import Config
from train_t2i.data import Order
from train_t2i.errors import EXIT_DONE, EXIT_LOCKED, EXIT_USER, UserError
from train_t2i.pair_data import Wanted, open_pairs
from train_t2i.schedule import EpsilonVP
from train_t2i.text_key import denoiser_digest

FLAGS = "--count 8 --num-inference-steps 2 --cfg-scale 2 --resolution 32 --shard-size 3 --batch-size 2"


@pytest.fixture
def make(sdxl_folder, prompts_file, models_from_memory, capsys, tmp_path):
    """(folder, more flags) -> (exit code, what was said); the flags are those of ``pairs_folder``."""

    def run(out: Path, more: str = "", prompts: Path = prompts_file) -> tuple[int, str]:
        capsys.readouterr()
        common = f"pairs --out {out} --pretrained-model {sdxl_folder} --data-path-train {prompts} --mixed-precision no"
        code = main(shlex.split(f"{common} {FLAGS} {more}"))
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def whole(make, tmp_path) -> Path:
    assert make(tmp_path / "whole")[0] == EXIT_DONE
    return tmp_path / "whole"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(ended: tuple[int, str], *words: str) -> None:
    code, said = ended
    assert code == EXIT_USER
    assert "Traceback" not in said
    told = said[said.index("error: ") :]
    assert len(told.splitlines()) <= 2
    assert all(word in told for word in words), told


# -- what it holds ---------------------------------------------------------------------------------------------------


def test_a_row_says_how_its_latent_was_made(whole, prompts_file, sdxl_folder):
    with open(whole / "metadata.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:6] == ["image", "prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale"]
    assert header[6:] == ["height", "width", "teacher_num_inference_steps", "teacher_cfg_scale", "model"]
    lines, order = prompts_file.read_text().splitlines(), Order(len(prompts_file.read_text().splitlines()), 30)
    told = ["cpu", "1", "1", "32", "32", "2", "2.0", denoiser_digest(str(sdxl_folder), "unet")]
    assert rows == [["", lines[order.index_at(i)], str(30 + i), *told] for i in range(8)]
    shards = [load_file(whole / f"latents-0000{i}.safetensors")["latents"] for i in range(3)]
    assert [len(shard) for shard in shards] == [3, 3, 2]
    config = Config(pretrained_model=str(sdxl_folder), resolution="32", mixed_precision="no")
    made = student.load_teacher(config, 2, 2.0).latents([row[1] for row in rows], [int(row[2]) for row in rows])
    torch.testing.assert_close(torch.cat(shards), made, rtol=1e-4, atol=1e-4)
    store = open_pairs(str(whole), Wanted((32, 32)))
    assert [(item["prompt"], item["seed"]) for item in (store[i] for i in range(8))] == [
        (r[1], int(r[2])) for r in rows
    ]


# -- going on --------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_with_the_same_command(make, whole, tmp_path, monkeypatch):
    """Bitwise the files of an unbroken run; what was finished is not made again."""
    out, write = tmp_path / "stopped", pair_rendering.write_shard

    def stop_at_the_second(config, model, prompts, rows, bar):
        if rows.start > 0:
            raise KeyboardInterrupt
        write(config, model, prompts, rows, bar)

    monkeypatch.setattr(pair_rendering, "write_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make(out, "--images")
    assert sorted(path.name for path in out.iterdir()) == [".lock", "images", "latents-00000.safetensors", "pairs.json"]
    made = []

    def counted(config, model, prompts, rows, bar):
        made.append((rows.start, rows.stop))
        write(config, model, prompts, rows, bar)

    monkeypatch.setattr(pair_rendering, "write_shard", counted)
    first = (out / "latents-00000.safetensors").stat()
    assert make(out, "--images")[0] == EXIT_DONE
    assert made == [(3, 6), (6, 8)]
    again = (out / "latents-00000.safetensors").stat()
    assert (first.st_mtime_ns, first.st_ino) == (again.st_mtime_ns, again.st_ino)
    assert make(tmp_path / "unbroken", "--images")[0] == EXIT_DONE
    assert contents(out) == contents(tmp_path / "unbroken")
    before = contents(whole)
    (whole / "latents-00001.safetensors").unlink()
    made.clear()
    assert make(whole)[0] == EXIT_DONE
    assert made == [(3, 6)]
    assert contents(whole) == before


def test_a_run_that_is_killed_while_it_begins_can_begin_again(make, tmp_path, monkeypatch):
    def killed(*files):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pair_rendering.storage, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out")
    assert not (tmp_path / "out" / "pairs.json").exists()
    assert make(tmp_path / "out")[0] == EXIT_DONE


def test_other_prompts_under_the_same_name_are_refused(make, prompts_file, tmp_path):
    mine, out = tmp_path / "prompts.txt", tmp_path / "out"
    shutil.copy(prompts_file, mine)
    assert make(out, prompts=mine)[0] == EXIT_DONE
    (out / "latents-00001.safetensors").unlink()
    before = contents(out)
    mine.write_text("\n".join(f"{line} at night" for line in prompts_file.read_text().splitlines()))
    one_line(make(out, prompts=mine), str(mine), "other prompts", "choose another --out")
    assert contents(out) == before
    shutil.copy(prompts_file, mine)
    assert make(out, prompts=mine)[0] == EXIT_DONE


def test_other_settings_are_refused(make, whole):
    one_line(make(whole, "--cfg-scale 3"), "cfg_scale: then 2.0, now 3.0")
    assert make(whole, "--batch-size 5")[0] == EXIT_DONE


# -- the teacher at the student's times, several processes -----------------------------------------------------------


def test_states_are_where_the_teacher_is_at_the_students_times(make, prompts_file, sdxl_folder, tmp_path):
    """By hand: its own sampler, with the student's levels put between its own."""
    out = tmp_path / "states"
    assert make(out, "--states --student-num-steps 4 --num-inference-steps 6")[0] == EXIT_DONE
    shard = load_file(out / "latents-00000.safetensors")
    teacher = student.load_teacher(
        Config(pretrained_model=str(sdxl_folder), resolution="32", mixed_precision="no"), 6, 2.0
    )
    path: EpsilonVP = teacher.family.path
    assert shard["grid"].equal(path.grid(4))
    assert shard["states"].shape == (3, 3, *shard["latents"].shape[1:])
    with open(out / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:3]
    assert {row["num_inference_steps"] for row in rows} == {"4"}
    cond = teacher.family.encode([row["prompt"] for row in rows], "")
    x = torch.cat(
        [torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(int(row["seed"]))) for row in rows]
    )
    levels = sorted({999, 832, 666, 499, 332, 166} | {999, 749, 499, 249}, reverse=True)
    at = {}
    for level, following in zip(levels, [*levels[1:], None], strict=True):
        t = torch.full((3,), level / 1000)
        s = torch.full((3,), 0.0 if following is None else following / 1000)
        negative, positive = (
            teacher.family.call(teacher.network, x, t, c).detach()
            for c in (cond.negative, replace(cond, negative=None))
        )
        x = path.step(x, path.to_x0(x, negative + 2.0 * (positive - negative), t), t, s)
        at[following] = x
    torch.testing.assert_close(shard["latents"], at[None], rtol=1e-4, atol=1e-4)
    for i, level in enumerate((749, 499, 249)):
        torch.testing.assert_close(shard["states"][:, i], at[level], rtol=1e-4, atol=1e-4)


def test_a_run_meets_the_states_of_its_own_times_alone(make, trainer, tmp_path):
    out = tmp_path / "states"
    assert make(out, "--states --student-num-steps 4")[0] == EXIT_DONE
    flags = f"--data-path-train {out} --states-weight 1 --sample-type ode --max-train-steps 1"
    run = trainer.run("run", f"{flags} --sample-num-steps 4", "direct")
    (line,) = tiny.log_lines(run)
    assert line["loss"] == pytest.approx(line["loss_latent"] + line["loss_states"], rel=1e-5)
    ended = trainer.ends("other", f"{flags} --sample-num-steps 2", "direct")
    one_line(
        (ended.code, ended.err), "the states of", "0.9990, 0.7490, 0.4990, 0.2490", "this run's are 0.9990, 0.4990"
    )


def test_a_folder_without_states_cannot_give_them(trainer, pairs_folder):
    flags = f"--data-path-train {pairs_folder} --states-weight 1 --sample-num-steps 2 --sample-type ode"
    ended = trainer.ends("run", flags, "direct")
    one_line((ended.code, ended.err), "has no states of its teacher", "make the pairs with --states")


def test_several_processes_share_the_files(make, whole, tmp_path, monkeypatch):
    """Each its own; the table by the last; bytes as from one process."""
    out = tmp_path / "shared"
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert make(out)[0] == EXIT_DONE
        assert (out / "metadata.csv").exists() == (rank == 0)
        if rank == 1:
            assert [path.name for path in sorted(out.glob("latents*"))] == ["latents-00001.safetensors"]
    mine, other = contents(out), contents(whole)
    assert {name for name in mine if mine[name] != other[name]} <= {".lock"}
    assert mine.keys() == other.keys()


def test_two_launches_do_not_write_one_folder(make, whole):
    held = storage.take_lock(whole / ".lock")
    try:
        code, said = make(whole)
    finally:
        storage.release_lock(held)
    assert code == EXIT_LOCKED
    assert "choose another --out" in said


@pytest.mark.parametrize(
    ("more", "told"), [("--states", "set --student-num-steps"), ("--shift 3", "--shift does nothing without --states")]
)
def test_flags_that_do_nothing_are_refused(make, tmp_path, more, told):
    one_line(make(tmp_path / "out", more), told)
    assert not (tmp_path / "out").exists()


# -- what is refused -------------------------------------------------------------------------------------------------

CSV = "image,prompt,seed"
GARBAGE = {
    "torn settings": ("pairs.json", '{"shard_', "pairs.json: cannot be read"),
    "settings in another encoding": ("pairs.json", "ä".encode("utf-16"), "pairs.json: cannot be read"),
    "settings that are a list": ("pairs.json", "[]", "not the settings of a pairs folder"),
    "settings of something else": ("pairs.json", "{}", "shard_size is None"),
    "no shard size": ("pairs.json", '{"shard_size": 0}', "shard_size is 0"),
    "rows in another encoding": ("metadata.csv", f"{CSV}\n,ä,3".encode("latin-1"), "not valid UTF-8"),
    "no rows": ("metadata.csv", CSV, "no row"),
    "nothing": ("metadata.csv", "", "is empty"),
    "other columns": ("metadata.csv", "image,text\n,a", "no column prompt"),
    "no seed": ("metadata.csv", "prompt\na", "no column seed"),
    "a seed of letters": ("metadata.csv", f"{CSV}\n,a,3\n,b,three", "metadata.csv:3: seed is 'three'"),
    "a seed that is blank": ("metadata.csv", f"{CSV}\n,a,", "metadata.csv:2: seed is ''"),
    "a seed that no generator takes": ("metadata.csv", f"{CSV}\n,a,{2**64}", "metadata.csv:2: seed is"),
    "a short row": ("metadata.csv", f"{CSV}\n,a", "2 cells under 3 columns"),
    "a torn shard": ("latents-00000.safetensors", b"torn", "latents-00000.safetensors: cannot be read"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_a_folder_that_cannot_be_used_is_one_line(trainer, pairs_folder, tmp_path, case):
    name, content, said = GARBAGE[case]
    folder = tmp_path / "garbage"
    shutil.copytree(pairs_folder, folder)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    ended = trainer.ends("run", f"--data-path-train {folder}", "direct")
    one_line((ended.code, ended.err), said)


@pytest.mark.parametrize("content", ['{"shard_', "[]"])
def test_settings_that_cannot_be_read_are_not_gone_on_with(make, whole, content):
    (whole / "pairs.json").write_text(content)
    one_line(make(whole), "pairs.json")


def test_a_folder_that_cannot_be_written_is_one_line(make, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(make(tmp_path / "file" / "out"), "cannot be written")


def test_a_row_without_a_latent_is_one_line(pairs_folder, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(pairs_folder, folder)
    with open(folder / "metadata.csv", "a") as file:
        file.write(",one more,38,cpu,1,1,32,32,2,2.0,\r\n")
    with pytest.raises(UserError, match="latents-00002"):
        open_pairs(str(folder), Wanted((32, 32)))[8]
