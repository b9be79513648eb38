"""DMDR on SD3, FLUX.1 and Qwen-Image: a LoRA generator on the base that teacher and guidance share, from the command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from flow_models import FAMILIES, save_flow

from train_t2i.__main__ import main
from train_t2i.build import build_family, build_method, resolved
from train_t2i.config import Config, DMDRConfig, Settings
from train_t2i.errors import EXIT_USER, UserError
from train_t2i.families import load_family
from train_t2i.methods.base import Batch, Clock
from train_t2i.sampling import few_step

PROMPTS = ["a small red circle", "a large blue square left of a small green cross, grey background"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {name: save_flow(root / name, name) for name in FAMILIES}


def settings_of(folder: Path, sample_type: str = "ode", **method: Any) -> Settings:
    run = Config(
        pretrained_model=str(folder), use_lora_gen=True, sample_num_steps=4, sample_type=sample_type, shift=3.0,
        resolution="48x32", text_length=24, mixed_precision="no", lora_rank=2,
    )  # fmt: skip
    return resolved(Settings(run, DMDRConfig(cfg_r=2.0, **method)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_with_rewards_resumes_bit_for_bit(
    name: str, folders: dict[str, Path], prompts_file: Path, towers: dict[str, Path], tmp_path: Path
) -> None:
    """Both dynamic strategies, SRPO, the ODE simulation, gradient checkpointing: 3 steps == 1 + resume + 2."""
    flags = (
        "--use-lora-gen --sample-num-steps 2 --sample-type ode --shift 3 --text-length 24 --dynamic-step 3 --s-type-gui beta "
        f"--clip-reward-model {towers['clip']} --hpsv2-reward-model {towers['hpsv2']} --reward-margin 2 --srpo --srpo-k 0.2 "
        "--gradient-checkpointing --max-train-steps 3 "
    )
    whole = tiny_runs.train(tmp_path, "whole", flags + "--cold-start-iter 1", model=folders[name], prompts=prompts_file)
    cut = tiny_runs.stopped_at(whole, 1, "cut")
    again = tiny_runs.train(
        tmp_path, "cut", flags + "--cold-start-iter 1 --auto-resume", model=folders[name], prompts=prompts_file
    )
    assert again == cut
    tiny.assert_same_checkpoint(whole, again, 3)
    tiny.assert_same_logs(whole, again)
    assert any(line.get("reward_hps") for line in tiny.log_lines(whole))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_base_serves_all_three_roles(name: str, folders: dict[str, Path]) -> None:
    settings = settings_of(folders[name])
    assert settings.run.layout == "shared"
    family = build_family(settings.run, torch.float32)
    nets = tiny.networks(family, "shared")
    assert list(nets.modules) == ["base"]
    frozen = {key: p.clone() for key, p in nets.modules["base"].named_parameters() if not p.requires_grad}
    plain = family.load(torch.float32).state_dict()
    assert all(torch.equal(plain[key.replace(".base_layer", "")], value) for key, value in frozen.items())


def test_the_ode_rollout_is_the_finished_sample_noised_anew(folders: dict[str, Path]) -> None:
    """DMDR's SD3 recipe: the student runs to the end, and its sample is noised to a level drawn a row."""
    settings = settings_of(folders["sd3"])
    family = build_family(settings.run, torch.float32)
    nets = tiny.networks(family, "shared")
    tiny.shake(nets.modules["base"])
    method = build_method(settings, nets, torch.device("cpu"), ())
    batch, clock = Batch([0, 1], PROMPTS), Clock()
    rollout = method.rollout(batch, clock)
    setting = method.setting  # type: ignore[attr-defined]
    draw, cond = setting.draw(clock, batch.indices), family.encode(PROMPTS)
    finished = few_step(
        lambda x, t: nets.x0("generator", x, t, cond), family.path, setting.grid,
        draw.normal("simulation/0", setting.latent_shape), None,
    )  # fmt: skip
    torch.testing.assert_close(rollout.x0, finished, rtol=0, atol=1e-5)
    fresh = draw.normal("student_input", setting.latent_shape)
    torch.testing.assert_close(rollout.x_t, family.path.add_noise(finished, fresh, rollout.t), rtol=0, atol=1e-5)
    assert set(rollout.t.tolist()) <= {round(float(t), 7) for t in setting.grid[:-1]} | set(setting.grid[:-1].tolist())


def test_sde_and_ode_roll_out_differently(folders: dict[str, Path]) -> None:
    drawn = {}
    for sample_type in ("ode", "sde"):
        settings = settings_of(folders["flux"], sample_type)
        family = build_family(settings.run, torch.float32)
        method = build_method(settings, tiny.networks(family, "shared"), torch.device("cpu"), ())
        drawn[sample_type] = method.rollout(Batch([0, 1], PROMPTS), Clock()).x0
    assert not torch.allclose(drawn["ode"], drawn["sde"])


def test_flags_that_an_architecture_has_no_use_for_are_refused(
    folders: dict[str, Path], sdxl_folder: Path, prompts_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def told(model: Path, more: str) -> str:
        flags = f"train --pretrained-model {model} --data-path-train {prompts_file} --output-dir {tmp_path} {more}"
        return tiny_runs.refused(capsys, *shlex.split(flags))

    assert "--text-length does nothing for sdxl" in told(sdxl_folder, "--text-length 64")
    assert "--text-length 513: the pipeline of sd3 takes at most 512" in told(folders["sd3"], "--text-length 513")
    assert "--guidance-embed does nothing for sd3" in told(folders["sd3"], "--guidance-embed 2")
    lora = "--use-lora-gen --resolution 64 --mixed-precision no"
    assert "no layer to_everything" in told(folders["sd3"], f"{lora} --lora-targets to_q,to_everything")
    assert "not a regular expression" in told(folders["sd3"], f"{lora} --lora-targets 'to_(q'")
    assert "multiples of 16" in told(folders["flux"], "--use-lora-gen --resolution 72 --mixed-precision no")


def test_lora_targets_are_the_users_choice(folders: dict[str, Path]) -> None:
    from train_t2i.adapters import add_adapter
    from train_t2i.build import adapter_specs

    run = settings_of(folders["sd3"]).run
    family = load_family("sd3", str(folders["sd3"]))
    spec = adapter_specs(type(run)(**{**vars(run), "lora_targets": r"ff\.net\.2, attn\.to_q"}), family)["generator"]
    net = family.load(torch.float32)
    add_adapter(net, family, "generator", spec)
    adapted = {key.split(".lora_A")[0] for key, _ in net.named_parameters() if ".lora_A." in key}
    assert adapted == {f"transformer_blocks.{i}.{end}" for i in range(2) for end in ("ff.net.2", "attn.to_q")}


def test_a_layer_that_takes_no_lora_is_told_by_name(folders: dict[str, Path]) -> None:
    """What lies inside an adapted layer is no layer: a target that matches there too serves a second adapter."""
    from train_t2i.adapters import AdapterSpec, add_adapter

    family = load_family("sd3", str(folders["sd3"]))
    net = family.load(torch.float32)
    for target, kind in (("attn", "Attention"), ("norm1", "AdaLayerNormZero"), ("transformer_blocks", "ModuleList")):
        with pytest.raises(
            UserError, match=rf"--lora-targets {target}: transformer_blocks\S* is a {kind}, which takes no LoRA"
        ):
            add_adapter(net, family, "generator", AdapterSpec(2, 2, ("to_q", target)))
    for adapter in ("generator", "guidance"):
        add_adapter(net, family, adapter, AdapterSpec(2, 2, (".*attn.to_q.*",)))
        assert sum(f".to_q.lora_A.{adapter}." in key for key, _ in net.named_parameters()) == 2


def test_the_trained_grid_shift_and_text_length_are_in_the_checkpoint(
    folders: dict[str, Path], prompts_file: Path, tmp_path: Path
) -> None:
    from train_t2i.checkpoint import run_of

    flags = "--use-lora-gen --sample-num-steps 4 --shift 5 --text-length 24"
    run = tiny_runs.train(tmp_path, "run", flags, model=folders["sd3"], prompts=prompts_file)
    path = tiny_runs.record(run, 2)
    _, record = run_of(path).load(path, [])
    assert record["grid"] == pytest.approx([1.0, 0.9375, 0.833333, 0.625, 0.0], abs=1e-6)
    assert (record["settings"]["shift"], record["settings"]["text_length"]) == (5.0, 24)


def test_a_stage_trains_on_the_times_of_the_run_that_it_starts_from(
    folders: dict[str, Path], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--shift 0 is another number at another resolution; what it came to is in the checkpoint, and can be given."""
    from train_t2i.checkpoint import run_of

    plain = "--use-lora-gen --sample-num-steps 2 --text-length 24 --batch-size 1 --sample-steps 0 --max-train-steps"
    given = {"model": folders["flux"], "prompts": prompts_file}

    def train(name: str, more: str) -> Path:
        return tiny_runs.train(tmp_path, name, f"{plain} {more}", **given)

    def refused(more: str) -> str:
        return tiny_runs.refused(capsys, *tiny_runs.arguments(tmp_path, "refused", f"{plain} {more}", **given))

    first = tiny_runs.record(train("first", "1 --shift 0 --resolution 32"), 1)
    shift = run_of(first).load(first, [])[1]["shift"]
    wide = f"2 --resolution 64 --resume-ckpt {first} --shift"
    told = refused(f"{wide} 0")
    assert "its student was trained on the times 1.0000, 0.6124, this stage's are 1.0000, 0.6129" in told
    assert f"set --shift {shift}, or --resolution and --sample-num-steps as they were" in told
    assert "its student was trained on the times" in refused(f"{wide} 3")
    second = tiny_runs.record(train("given", f"{wide} {shift}"), 2)
    grids = [run_of(path).load(path, [])[1]["grid"] for path in (first, second)]
    assert grids[0] == grids[1]
    assert "shift: checkpoint=" in refused(f"3 --resolution 64 --resume-ckpt {second} --shift 3")
    train("same", f"2 --resolution 32 --shift 0 --resume-ckpt {first} --learning-rate-gen 1e-4")
    train("first", "2 --shift 0 --resolution 32 --auto-resume")


@pytest.mark.parametrize("kind", ["export", "record"])
def test_a_start_from_a_student_of_other_times_is_told(
    kind: str, folders: dict[str, Path], prompts_file: Path, tmp_path: Path
) -> None:
    """Legal, and seldom meant: two launchers with two shifts."""
    lora = "--use-lora-gen " if kind == "export" else ""
    plain = f"{lora}--sample-num-steps 2 --text-length 24 --batch-size 1 --sample-steps 0 --max-train-steps 1"
    given = {"model": folders["sd3"], "prompts": prompts_file}
    first = tiny_runs.train(tmp_path, "first", f"{plain} --shift 3", **given)
    source = first / "checkpoints" / "lora_gen" / "step-1" if kind == "export" else tiny_runs.record(first, 1)
    for shift, told in ((3, 0), (5, 1)):
        run = tiny_runs.train(tmp_path, f"{shift}", f"{plain} --shift {shift} --generator-init {source}", **given)
        said = f"warning: {source} was trained on the times 1.0000, 0.7500, this run's are 1.0000, 0.8333"
        assert (run / "log.txt").read_text().count(said) == told
    if kind == "export":  # its weights are all that is needed
        tiny_runs.record(first, 1).write_bytes(b"torn")
        run = tiny_runs.train(tmp_path, "torn", f"{plain} --shift 5 --generator-init {source}", **given)
        assert "was trained on the times" not in (run / "log.txt").read_text()


def test_a_start_from_a_lora_that_lies_on_more_than_the_base_is_refused(
    folders: dict[str, Path], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone it would leave out what it was trained on, and nobody would see; the whole of it can be given."""
    plain = "--use-lora-gen --sample-num-steps 2 --text-length 24 --batch-size 1 --sample-steps 0 --max-train-steps"
    given = {"model": folders["sd3"], "prompts": prompts_file}
    below = tiny_runs.train(tmp_path, "first", f"{plain} 1", **given) / "checkpoints" / "lora_gen" / "step-1"
    upon = tiny_runs.train(tmp_path, "second", f"{plain} 1 --generator-init {below}", **given)
    lora = upon / "checkpoints" / "lora_gen" / "step-1"
    for flag, calls in (("--generator-init", 2), ("--xl-ode-pretrain-path", 1)):
        third = tiny_runs.arguments(tmp_path, "third", f"{plain} 1 --sample-num-steps {calls} {flag} {lora}", **given)
        told = tiny_runs.refused(capsys, *third)
        assert f"{lora}: this LoRA lies on {below}, which would be left out" in told
        assert "export its run with --to merged, and give that folder" in told
        assert main(["doctor", *third[1:]]) == EXIT_USER
        assert f"{flag}: {lora}: this LoRA lies on {below}" in capsys.readouterr().out
    assert main(["export", "--run", str(upon), "--to", "merged", "--out", str(tmp_path / "whole")]) == 0
    tiny_runs.train(tmp_path, "third", f"{plain} 1 --generator-init {tmp_path / 'whole'}", **given)
    tiny_runs.train(tmp_path, "second", f"{plain} 2 --generator-init {below} --auto-resume", **given)
    plain = plain.removeprefix("--use-lora-gen ")
    whole = tiny_runs.record(tiny_runs.train(tmp_path, "all", f"{plain} 1 --generator-init {below}", **given), 1)
    tiny_runs.train(tmp_path, "all-again", f"{plain} 1 --generator-init {whole}", **given)


def test_supervised_weights_have_no_times_to_differ(
    folders: dict[str, Path], prompts_file: Path, images_table: Path, tmp_path: Path
) -> None:
    plain = "--use-lora-gen --text-length 24 --batch-size 1 --sample-steps 0 --max-train-steps 1"
    first = tiny_runs.train(tmp_path, "first", plain, "sft", model=folders["sd3"], prompts=images_table)
    source = first / "checkpoints" / "lora_gen" / "step-1"
    few = f"{plain} --sample-num-steps 2 --shift 5 --generator-init {source}"
    run = tiny_runs.train(tmp_path, "few", few, model=folders["sd3"], prompts=prompts_file)
    assert "was trained on the times" not in (run / "log.txt").read_text()


def test_help_names_the_families(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "qwen_image" in capsys.readouterr().out
