"""The sample images that sheet and monitor share: what is made once, and on which process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from test_monitor import WATCHED

from train_t2i.__main__ import main
from train_t2i.cli import parse
from train_t2i.errors import EXIT_DONE, UserError
from train_t2i.families.sdxl import SDXL
from train_t2i.monitor import build_monitor
from train_t2i.prompt_cache import CachedText
from train_t2i.sheet import SampleSheet


def test_sample_prompts_are_encoded_once_a_run(trainer, towers, prompts_file, sdxl_folder, tmp_path, monkeypatch):
    """For the sheet, the teacher and every seed of every reading; also where the texts come from a cache."""
    calls: list[list[str]] = []
    for kind in (SDXL, CachedText):

        def encode(self, prompts, *rest, _encode=kind.encode):
            calls.append([*prompts])
            return _encode(self, prompts, *rest)

        monkeypatch.setattr(kind, "encode", encode)
    cache = tmp_path / "cache"
    told = f"--pretrained-model {sdxl_folder} --mixed-precision no --data-path-train {prompts_file}"
    assert main(["cache", *told.split(), "--out", str(cache)]) == EXIT_DONE
    for name, source in (("online", ""), ("cached", f"--prompt-cache {cache}")):
        calls.clear()
        run = trainer.run(name, f"{WATCHED.format(**towers)} {source} --max-train-steps 2")
        assert len(tiny.log_lines(run, "monitor")) == 3
        assert [call for call in calls if len(call) > 1] == [["a red circle number 0", "a blue circle number 1"]]
        assert len(calls) == 1 + 4  # one row a tick


def test_the_main_process_alone_loads_what_scores():
    """Where all must draw, the others have no use for towers and references."""
    settings = parse(["--monitor-rewards", "clip=nowhere"])
    drawing = SampleSheet(method=object(), writes=False)
    assert build_monitor(settings, drawing, (), [], torch.float32) is None
    with pytest.raises(UserError, match="nowhere"):
        build_monitor(
            settings, SampleSheet(method=SimpleNamespace(setting=SimpleNamespace(device="cpu"))), (), [], torch.float32
        )
