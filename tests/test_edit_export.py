"""A student of an edit model in other hands: the LoRA on the stock base, its whole weights, and the gallery of its checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from diffusers import QwenImageTransformer2DModel
from edit_models import PIPELINES, load_edit, save_edit, save_edits
from test_edit_training import METHODS
from tiny_runs import refused

from train_t2i.__main__ import main

FAMILIES = list(PIPELINES)
SIZES = {
    "qwen_image_edit": "--resolution 64 --source-size 64",
    "qwen_image_edit_plus": "--resolution 64 --source-size 64 --source-seen-size 64",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("edit")
    return {family: save_edit(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("edits")
    return {family: save_edits(root / family, several=family.endswith("plus")) for family in FAMILIES}


@pytest.fixture
def run(models: dict[str, Path], tables: dict[str, Path], trainer: Any) -> Any:
    """A run of two steps of a family, a LoRA's or of all weights."""

    def trained(family: str, more: str) -> Path:
        flags = (
            f"--pretrained-model {models[family]} --data-path-train {tables[family]} {SIZES[family]} --num-workers 0"
        )
        return trainer.run(family, f"{flags} --learning-rate-gen 1e-2 {more}", "dmdr")

    return trained


LORA = f"{METHODS['dmdr']} --lora-scale-f 3"
FULL = METHODS["dmdr"].replace("--use-lora-gen", "")


def export(run: Path, to: str) -> Path:
    out = run.parent / to
    assert main(["export", str(run), "--to", to, "--out", str(out)]) == 0
    return out


def weights_of(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_adds_what_was_trained(family: str, run: Any, models: dict[str, Path]) -> None:
    """Under both kinds of names, at strength 1; the folders of whole weights hold the same sum."""
    trained = run(family, LORA)
    base = load_edit(models[family], family)
    before = weights_of(base.transformer)
    merged = QwenImageTransformer2DModel.from_pretrained(export(trained, "merged"), subfolder="transformer")
    expected = weights_of(merged)
    assert apart(before, expected) > 1e-3
    for to in ("lora", "kohya"):
        base.load_lora_weights(export(trained, to))
        base.fuse_lora()
        base.unload_lora_weights()
        assert apart(weights_of(base.transformer), expected) < 1e-6, to
        base.transformer.load_state_dict(before)
    whole = export(trained, "pipeline")
    assert json.loads((whole / "model_index.json").read_text())["_class_name"] == PIPELINES[family].__name__
    assert apart(weights_of(load_edit(whole, family).transformer), expected) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_are_exported_and_are_no_lora(family: str, run: Any, capsys: Any) -> None:
    trained = run(family, FULL)
    expected = tiny_runs.weights(trained, 2)
    merged = QwenImageTransformer2DModel.from_pretrained(export(trained, "merged"), subfolder="transformer")
    assert apart(weights_of(merged), expected) == 0
    assert apart(weights_of(load_edit(export(trained, "pipeline"), family).transformer), expected) == 0
    for to in ("lora", "kohya"):
        assert "its generator's own weights" in refused(capsys, "export", trained, "--to", to)


def test_a_gallery_scores_each_edit_beside_its_own_sources(run: Any, tables: dict[str, Path], capsys: Any) -> None:
    """The numbers are those of evaluate, whose prompts, sources and noise are the same."""
    trained, table = run("qwen_image_edit_plus", LORA), tables["qwen_image_edit_plus"]
    scorer = ["--scorer", "edit_models:brightness"]
    page, numbers = trained.parent / "page.html", trained.parent / "table.json"
    asked = ["--prompts", str(table), "--count", "4"]
    assert main(["gallery", str(trained), *asked, *scorer, "--out", str(page)]) == 0
    assert main(["evaluate", str(trained), *asked, *scorer, "--out", str(numbers), "--batch-size", "4"]) == 0
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"))[1])
    assert data["columns"] == ["teacher", "step 2"]
    (by_row,) = data["scores"].values()
    found = sum(row[1] for row in by_row) / len(by_row)
    assert found == pytest.approx(json.loads(numbers.read_text())[0]["adherence"], abs=1e-6)
    assert "give --prompts, a table of edits" in refused(capsys, "gallery", trained, *scorer)
