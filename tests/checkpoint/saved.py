"""Tiny checkpoints whose contents tell their step."""

from pathlib import Path

import torch

from train_t2i.checkpoint import Part, RunFolder

CRASHED = 9


def parts_at(step: int) -> dict[str, Part]:
    """Two parts of a few hundred bytes whose contents tell the step."""
    weights = {"a.weight": torch.full((3, 4), float(step)), "b": torch.tensor(step), "c": torch.ones(5).bfloat16()}
    return {
        "accelerator_1": Part({"model": weights, "optimizer": {"a.weight/exp_avg": torch.arange(step, step + 6.0)}}),
        "accelerator_2": Part(
            {"model": {"x": torch.full((2,), -float(step))}}, {"optimizer": {"step": step, "lr": [0.1]}}
        ),
    }


def save(run: RunFolder, step: int) -> Path:
    return run.save(step, parts_at(step), {"tick": 5 * step, "config": {"seed": 1, "name": "x"}})


def assert_holds(run: RunFolder, path: Path, step: int) -> None:
    parts, record = run.load(path)
    assert (record["step"], record["tick"], record["config"]) == (step, 5 * step, {"seed": 1, "name": "x"})
    expected = parts_at(step)
    assert parts.keys() == expected.keys()
    for name, part in expected.items():
        assert parts[name].values == part.values
        assert parts[name].tensors.keys() == part.tensors.keys()
        for stem, tensors in part.tensors.items():
            found = parts[name].tensors[stem]
            assert found.keys() == tensors.keys()
            assert all(
                torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in tensors.items()
            )


def files_of(run: RunFolder) -> list[Path]:
    return sorted(path for path in run.folder.rglob("*") if path.is_file())
