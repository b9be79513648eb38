"""Damaged, foreign and hostile files: never loaded, never executed, always named."""

import io
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from saved import assert_holds, files_of

from train_t2i import storage
from train_t2i.checkpoint import Part, RunFolder, run_of
from train_t2i.errors import EXIT_USER, UserError


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def assert_refused(run: RunFolder, path: Path, word: str) -> None:
    with pytest.raises(UserError) as error:
        run.load(path)
    assert error.value.exit_code == EXIT_USER
    assert "\n" not in str(error.value)
    assert word in error.value.message


def test_every_flipped_bit_is_seen(saved: RunFolder) -> None:
    generator = torch.Generator().manual_seed(0)
    for path in [path for path in files_of(saved) if "step-2" in str(path)]:
        whole = path.read_bytes()
        bits = torch.randint(8 * len(whole), (64,), generator=generator).tolist()
        for bit in [0, 8 * len(whole) - 1, *bits]:
            flip(path, bit)
            assert saved.damage(saved.record(2)), (path, bit)
            path.write_bytes(whole)
    assert saved.damage(saved.record(2)) is None


@pytest.mark.parametrize("damage", ["empty", "half", "byte", "longer", "zeros", "html", "deleted", "swapped", "folder"])
def test_damage_falls_back_with_a_warning_and_refuses_by_name(
    saved: RunFolder, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in [path for path in files_of(saved) if "step-2" in str(path)]:
        whole = path.read_bytes()
        other = Path(str(path).replace("step-2", "step-1")).read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage != "deleted":
            broken = {
                "empty": b"",
                "half": whole[: len(whole) // 2],
                "byte": whole[:-1],
                "longer": whole + b"\0",
                "zeros": bytes(len(whole)),
                "html": b"<!DOCTYPE html><html></html>",
                "swapped": other,
            }
            path.write_bytes(broken[damage])
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert saved.latest() == saved.record(1)
        if path.suffix == ".pt" and damage == "deleted":
            assert not caplog.records  # no record, no checkpoint: nothing was damaged
        else:
            assert path.name in caplog.text
            assert "step 2" in caplog.text
        assert_refused(saved, saved.record(2), path.name)
        shutil.rmtree(path) if damage == "folder" else path.unlink(missing_ok=True)
        path.write_bytes(whole)
    assert_holds(saved, saved.record(2), 2)


def test_files_that_changed_places_within_a_step(saved: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    """Each is whole, of the right size and step, and loads: it is only not where it was saved."""
    numbers = {"accelerator_1": 1.0, "accelerator_2": 2.0}
    saved.save(3, {name: Part({"model": {"a": torch.full((9,), value)}}) for name, value in numbers.items()}, {})
    first, second = (saved.folder / f"{name}/step-3/model.safetensors" for name in numbers)
    wholes = first.read_bytes(), second.read_bytes()
    first.write_bytes(wholes[1])
    second.write_bytes(wholes[0])
    with caplog.at_level(logging.WARNING):
        assert saved.latest() == saved.record(2)
    assert str(first) in caplog.text
    assert_refused(saved, saved.record(3), str(first))


def sealed(content: object) -> bytes:
    """``content`` as torch.save writes it, under a digest that is right."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()[:-2] + storage.SEAL_BYTES.to_bytes(2, "little")
    return body + storage.SEAL + xxhash.xxh3_128_hexdigest(body).encode()


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_record_never_runs(saved: RunFolder, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    good = storage.read_record(saved.record(2))
    torch.save({**good, "x": Canary(canary)}, saved.record(2))
    assert_refused(saved, saved.record(2), "step-2.pt")
    saved.record(2).write_bytes(sealed({**good, "x": Canary(canary)}))
    assert_refused(saved, saved.record(2), "step-2.pt")
    assert saved.latest() == saved.record(1)
    assert not canary.exists()
    torch.load(saved.record(2), weights_only=False)  # the trap does work
    assert canary.exists()


def test_a_record_of_the_wrong_kind(saved: RunFolder) -> None:
    good = storage.read_record(saved.record(2))
    outside = {"../../../etc/step-2/x.json": [1, "0"]}
    for content in (
        [1, 2],
        {"state_dict": torch.ones(2)},
        {**good, "step": 1},
        {**good, "manifest": outside},
        {**good, "manifest": {"accelerator_1/step-1/model.safetensors": good["manifest"].popitem()[1]}},
        {**good, "manifest": {"accelerator_1/step-2/model.safetensors": 3}},
        {**good, "manifest": None},
    ):
        saved.record(2).write_bytes(sealed(content))
        assert_refused(saved, saved.record(2), "step-2.pt")
    saved.record(2).write_bytes(sealed({**good, "version": 99}))
    assert_refused(saved, saved.record(2), "newer version")


def test_paths_that_a_person_gives(saved: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.folder / "torch_units")
    link = tmp_path / "best.pt"
    link.symlink_to(saved.record(1))
    for given in (saved.record(1), Path("step-1.pt"), Path("../torch_units/../torch_units/step-1.pt"), link):
        assert_holds(run_of(given), given if given != link else link.resolve(), 1)
    for wrong in ("x.pt", "torch_units/step-1.pt", "step-1.safetensors", "step-01.pt", "/", ""):
        with pytest.raises(UserError, match="not a checkpoint of a run"):
            run_of(tmp_path / wrong)
    assert_refused(saved, saved.record(7), "no checkpoint at")
    assert RunFolder(tmp_path / "none").latest() is None
    assert RunFolder(tmp_path / "none").clean() == []
