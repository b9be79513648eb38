"""``--gradient-checkpointing auto``: what it chooses by the plan and a device's memory, and how a run tells of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train_t2i import build, on_host
from train_t2i.build import resolved
from train_t2i.cli import parse
from train_t2i.config import Settings
from train_t2i.errors import UserError
from train_t2i.plan.automatic import choose, memory_of, others_fit, plan_of


def settings_of(model: object, more: str = "") -> Settings:
    flags = f"--pretrained-model {model} --model-family sdxl --resolution 128 --batch-size 2 --use-lora-gen {more}"
    return resolved(parse([*flags.split(), "--gradient-checkpointing", "auto"]))


def test_a_switch_may_be_on_off_or_auto(tmp_path: Path) -> None:
    def parsed(*arguments: str) -> object:
        return parse(arguments).run.gradient_checkpointing

    flag = "--gradient-checkpointing"
    assert [parsed(flag, word) for word in ("on", "off", "auto", "true", "0")] == [True, False, "auto", True, False]
    assert [parsed(flag, word) for word in ("host", "networks", "rewards+networks+decoder")] == [
        "host",
        "networks",
        True,
    ]
    assert (parsed(), parsed(flag)) == (False, True)
    (tmp_path / "a.yaml").write_text("gradient_checkpointing: auto\n")
    (tmp_path / "b.yaml").write_text("gradient_checkpointing: true\n")
    assert [parsed("--config", str(tmp_path / name)) for name in ("a.yaml", "b.yaml")] == ["auto", True]
    with pytest.raises(UserError, match=r"neither on nor off nor auto nor host nor some of networks\+decoder\+rewards"):
        parsed(flag, "maybe")
    with pytest.raises(UserError, match="'auto' is neither on nor off"):
        parse(["--use-lora-gen", "auto"])


def test_the_parts_are_what_is_recomputed() -> None:
    def recomputed(*value: str) -> tuple[str, ...]:
        flags = ["--clip-reward-model", "x", "--gradient-checkpointing", *value]
        return parse(flags).run.recomputed

    assert recomputed("off") == ()
    assert recomputed("rewards+decoder") == ("decoder", "rewards")
    assert recomputed("on") == recomputed("host") == recomputed("auto") == ("networks", "decoder", "rewards")
    with pytest.raises(UserError, match="--gradient-checkpointing does nothing for images that no loss sees"):
        parse(["--gradient-checkpointing", "decoder+rewards"])


def test_the_fastest_that_fits_is_chosen(sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_host, "SMALL_BYTES", 0)  # else nothing of so small a network would go
    settings = settings_of(sdxl_folder, "--sample-steps 0")
    off, on, host = (plan_of(settings, "ddp", 1, way).total for way in (False, True, "host"))
    assert host < on < off
    for memory, way, told in (
        (off, False, "auto: off (planned"),
        (off - 1, True, "auto: on (planned"),
        (on, True, "auto: on (planned"),
        (on - 1, "host", "auto: host (planned"),
        (host - 1, "host", "auto: host, and still too much (planned"),
    ):
        chosen, said = choose(settings, "ddp", 1, memory)
        assert chosen == way
        assert told in said
    assert f"planned {off / 1e9:.1f} GB off, {on / 1e9:.1f} GB on, {host / 1e9:.1f} GB host" in said


def test_images_alone_are_recomputed_where_that_is_enough(sdxl_folder: Path, towers: dict[str, Path]) -> None:
    """And not tried where another phase is too large by itself."""
    settings = settings_of(sdxl_folder, f"--clip-reward-model {towers['clip']} --cold-start-iter 0")
    off, images, on = (plan_of(settings, "ddp", 1, way) for way in (False, "decoder+rewards", True))
    assert on.total < images.total < off.total
    assert choose(settings, "ddp", 1, images.total)[0] == "decoder+rewards"
    assert choose(settings, "ddp", 1, images.total - 1)[0] is True
    assert others_fit(off, images.total)
    _, said = choose(settings, "ddp", 1, on.total)
    assert ("decoder+rewards" in said) == others_fit(off, on.total)


def test_it_is_on_where_nothing_can_be_planned(tmp_path: Path, sdxl_folder: Path) -> None:
    assert memory_of(torch.device("cpu")) is None
    assert choose(settings_of(sdxl_folder), "ddp", 1, None) == (
        True, "--gradient-checkpointing auto: on (the memory of a CPU is not the run's alone)",
    )  # fmt: skip
    on, said = choose(settings_of("somebody/elses-model"), "ddp", 1, 10**12)
    assert on
    assert "not planned: --pretrained-model somebody/elses-model: its sizes are not known here" in said


def test_a_run_records_and_tells_what_was_chosen(trainer) -> None:
    run = trainer.run("auto", "--gradient-checkpointing auto --max-train-steps 1 --ratio-update 1")
    assert "--gradient-checkpointing auto: on (the memory of a CPU" in (run / "log.txt").read_text()
    record = torch.load(run / "checkpoints" / "torch_units" / "step-1.pt", weights_only=True)
    assert record["settings"]["gradient_checkpointing"] is True


def test_what_is_chosen_is_what_is_built(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that holds everything: off, in the family as in the record."""
    built, load = [], build.build_family

    def noted(run, dtype):
        built.append(run.gradient_checkpointing)
        return load(run, dtype)

    monkeypatch.setattr(build, "build_family", noted)
    monkeypatch.setattr("train_t2i.plan.automatic.memory_of", lambda device: 10**12)
    run = trainer.run("roomy", "--gradient-checkpointing auto --max-train-steps 1 --ratio-update 1")
    record = torch.load(run / "checkpoints" / "torch_units" / "step-1.pt", weights_only=True)
    assert built == [False] == [record["settings"]["gradient_checkpointing"]]
    assert "--gradient-checkpointing auto: off (planned" in (run / "log.txt").read_text()
