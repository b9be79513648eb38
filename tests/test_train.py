"""Whole tiny runs inside this process: exact resume, stages, skipped updates, what is written, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image

from train_t2i import losses
from train_t2i.checkpoint import RunFolder
from train_t2i.config import Config, DMDRConfig, Settings, fields_of
from train_t2i.engine import AdamSettings, Engine
from train_t2i.errors import EXIT_DISK, EXIT_DONE, EXIT_NON_FINITE, EXIT_USER, UserError
from train_t2i.families import load_family
from train_t2i.train import learning_rate

RL = "--cold-start-iter 2 --clip-reward-model {clip} --hpsv2-reward-model {hpsv2} --reward-margin 2"


def record(root: Path, step: int) -> Path:
    return root / "checkpoints" / "torch_units" / f"step-{step}.pt"


def stopped_at(root: Path, step: int, name: str) -> Path:
    """A copy of a run as if it had been killed after saving ``step``: later logs and half a later checkpoint are there."""
    copy = root.with_name(name)
    shutil.copytree(root, copy)
    for later in (s for s in RunFolder(copy).steps() if s > step):
        record(copy, later).unlink()
    return copy


def weights(root: Path, step: int, part: str = "accelerator_1") -> dict[str, torch.Tensor]:
    return dict(tiny.checkpoint_files(root, step))[f"{part}/model.safetensors"]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


# -- exact resume ----------------------------------------------------------------------------------------------------

CASES = {
    "ode": ("ode", "--sample-num-steps 2"),
    "ode-lora": ("ode", "--use-lora-gen --lora-rank 2 --gradient-accumulation-steps 2"),
    "sft": ("sft", "--caption-dropout 0.5 --cache-rows --lr-scheduler cosine --lr-warmup-steps 2"),
    # cold start to step 2, rewards from then on
    "paired": ("dmdr", RL),
    "shared": ("dmdr", RL + " --use-lora-gen --gradient-accumulation-steps 2 --sample-num-steps 2 --dynamic-step 3"),
    "paired_lora": ("dmdr", RL + " --use-lora-gen --layout paired_lora --generator-init {unet} --s-type-gui beta"),
    "separate": ("dmdr", RL + " --layout separate --lora-rank 32 --gradient-checkpointing"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stop_anywhere_changes_nothing(trainer, towers, sdxl_folder_3, case):
    """The same ticks with and without a stop: bitwise equal weights, optimizer states and logs."""
    method, flags = CASES[case]
    flags = flags.format(**towers, unet=sdxl_folder_3 / "unet") + " --batch-size 1 --max-train-steps 4"
    whole = trainer.run("whole", f"{flags} --checkpoint-steps 1", method)
    assert RunFolder(whole).steps() == [4, 3, 2, 1]
    assert not equal(weights(whole, 1), weights(whole, 4))
    for step in (1, 3) if case == "shared" else (1,):
        resumed = stopped_at(whole, step, f"resumed-{step}")
        again = trainer.run(resumed.name, f"{flags} --checkpoint-steps 2 --resume-ckpt latest", method)
        assert f"going on from {record(again, step)}" in (again / "log.txt").read_text()
        assert RunFolder(again).steps()[0] == 4
        tiny.assert_same_checkpoint(whole, again, 4)
        tiny.assert_same_logs(whole, again)
        assert not [path for path in (again / "checkpoints").glob("accelerator_1/step-3") if step == 1]  # half a save


def test_reward_columns_fill_after_the_cold_start(trainer, towers):
    run = trainer.run("rl", RL.format(**towers) + " --batch-size 1 --max-train-steps 3")
    lines = tiny.log_lines(run)
    for name in ("reward_clip", "loss_clip", "reward_hps", "loss_hps"):
        assert [line[name] is None for line in lines] == [True, True, False]
    last = lines[-1]
    expected = last["loss_dmd"] + 0.3 * last["loss_clip"] + 0.3 * last["loss_hps"]
    assert last["loss"] == pytest.approx(expected, rel=1e-5)
    assert last["loss_clip"] == pytest.approx(2 - last["reward_clip"], rel=1e-5)


# -- stages ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def first(trainer) -> Path:
    return trainer.run("first", "--batch-size 1")


def test_a_stage_takes_weights_optimizers_and_counters_but_not_the_rates(trainer, first):
    flags = f"--batch-size 1 --resume-ckpt {record(first, 2)} --max-train-steps 3"
    still = trainer.run("still", f"{flags} --learning-rate-gen 0 --learning-rate-gui 0 --ratio-update 1")
    for part in ("accelerator_1", "accelerator_2"):
        assert equal(weights(first, 2, part), weights(still, 3, part))
    (line,) = tiny.log_lines(still)
    assert (line["tick"], line["step"], line["samples_seen"], line["lr"]) == (5, 3, 5, 0)
    said = (still / "log.txt").read_text()
    assert "learning_rate_gen: checkpoint=0.001 now=0.0" in said
    assert "ratio_update: checkpoint=2 now=1" in said
    # its optimizers go on counting and remember
    mine, before = (dict(tiny.checkpoint_files(root, n)) for root, n in ((still, 3), (first, 2)))
    for part, updates in (("accelerator_1", 1), ("accelerator_2", 1)):
        name = f"{part}/optimizer.safetensors"
        steps = [key for key in mine[name] if key.endswith("/step")]
        assert all(mine[name][key] == before[name][key] + updates for key in steps)
        averages = [key for key in mine[name] if key.endswith("/exp_avg_sq")]
        assert all(torch.isclose(mine[name][k], before[name][k], rtol=0.2, atol=1).all() for k in averages[:5])
    moved = trainer.run("moved", f"{flags} --learning-rate-gen 1e-2 --learning-rate-gui 0 --lora-scale-f 1.5")
    assert [line["lr"] for line in tiny.log_lines(moved)] == [1e-2]
    assert not equal(weights(first, 2), weights(moved, 3))
    assert equal(weights(first, 2, "accelerator_2"), weights(moved, 3, "accelerator_2"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--use-lora-gen", "use_lora_gen"),
        ("--layout separate --lora-rank 32", "layout"),
        ("--lora-rank 4", "lora_rank"),
        ("--sample-num-steps 4", "sample_num_steps"),
    ],
)
def test_a_stage_of_another_shape_is_refused_before_models_load(trainer, first, monkeypatch, more, named):
    monkeypatch.setattr("train_t2i.build.build_family", lambda *args: pytest.fail("loaded a model"))
    ended = trainer.ends("second", f"--batch-size 1 --resume-ckpt {record(first, 2)} {more}")
    assert ended.code == EXIT_USER
    assert f"{named}: checkpoint=" in ended.err
    assert "Traceback" not in ended.err


def test_a_layout_is_compared_by_what_it_means(trainer, sdxl_folder_3):
    """'auto' is paired_lora with an initialised generator and shared without: their LoRAs look alike."""
    init = f"--generator-init {sdxl_folder_3 / 'unet'}"
    first = trainer.run("first", f"--batch-size 1 --use-lora-gen {init} --max-train-steps 1")
    start = f"--batch-size 1 --use-lora-gen --resume-ckpt {record(first, 1)}"
    ended = trainer.ends("second", start)
    assert ended.code == EXIT_USER
    assert "layout: checkpoint='paired_lora' now='shared'" in ended.err
    ended = trainer.ends("third", f"{start} --layout paired_lora")
    assert ended.code == EXIT_USER
    assert "generator_init: checkpoint=" in ended.err
    trainer.run("fourth", f"{start} {init} --layout paired_lora --model-family sdxl")


def test_the_runs_own_checkpoint_wins_over_the_stage_it_started_from(trainer, first):
    """An interrupted stage 2, started again by the same command, never restarts."""
    flags = f"--batch-size 1 --auto-resume --resume-ckpt {record(first, 2)} --checkpoint-steps 1"
    trainer.run("second", f"{flags} --max-train-steps 3")
    second = trainer.run("second", f"{flags} --max-train-steps 4")
    said = (second / "log.txt").read_text()
    assert said.count(f"going on from {record(first, 2)}") == 1
    assert said.count(f"going on from {record(second, 3)}") == 1
    whole = trainer.run("whole", f"{flags} --max-train-steps 4")
    tiny.assert_same_checkpoint(second, whole, 4)
    tiny.assert_same_logs(second, whole)


def test_continuing_needs_the_same_settings(trainer, first):
    for more, named in (
        ("--learning-rate-gen 2e-3", "learning_rate_gen: checkpoint=0.001 now=0.002"),
        ("--ratio-update 3", "ratio_update"),
        ("--seed 31", "seed"),
        ("--method ode", "method: checkpoint='dmdr' now='ode'"),
        ("--lr-scheduler cosine --max-train-steps 9", "lr_scheduler"),
    ):
        method = "ode" if "ode" in more else "dmdr"
        ended = trainer.ends("first", f"--batch-size 1 --auto-resume {more}", method)
        assert ended.code == EXIT_USER, more
        assert named in ended.err
        assert "new --exp-name" in ended.err
    again = trainer.run("first", "--batch-size 1 --auto-resume --gradient-checkpointing --max-train-steps 3")
    said = (again / "log.txt").read_text()
    assert "gradient_checkpointing: checkpoint=False now=True" in said  # told
    assert "max_train_steps: checkpoint" not in said  # nobody's business
    assert RunFolder(again).steps() == [3, 2]


def test_under_a_cosine_the_length_is_part_of_the_rates(trainer):
    trainer.run("cosine", "--batch-size 1 --lr-scheduler cosine")
    ended = trainer.ends("cosine", "--batch-size 1 --lr-scheduler cosine --max-train-steps 5 --auto-resume")
    assert ended.code == EXIT_USER
    assert "max_train_steps: checkpoint=2 now=5" in ended.err


def test_another_number_of_processes_is_refused(trainer, first, monkeypatch):
    monkeypatch.setattr(Engine, "world", property(lambda self: 3, lambda self, value: None), raising=False)
    ended = trainer.ends("first", "--batch-size 1 --auto-resume")
    assert ended.code == EXIT_USER
    assert "made by 1 processes, this launch has 3" in ended.err


def test_a_run_without_a_guidance_network_cannot_be_continued_by_dmdr_but_can_start_it(trainer):
    ode = trainer.run("ode", "", "ode")
    ended = trainer.ends("cold", f"--resume-ckpt {record(ode, 2)}")
    assert ended.code == EXIT_USER
    assert "no guidance network" in ended.err
    assert "--xl-ode-pretrain-path" in ended.err
    cold = trainer.run("cold", f"--xl-ode-pretrain-path {record(ode, 2)} --learning-rate-gen 0 --batch-size 1")
    assert equal(weights(cold, 2), weights(ode, 2))


def test_a_one_step_student_without_an_initialisation_is_warned_of(trainer, first):
    assert "warning: a one-step student without" in (first / "log.txt").read_text()
    more = f"--batch-size 1 --resume-ckpt {record(first, 2)} --max-train-steps 3"
    assert "warning" not in (trainer.run("second", more) / "log.txt").read_text()


def test_distil_first_then_rewards_alone(trainer, first, towers):
    alone = f"--batch-size 1 --dmd-weight 0 --clip-reward-model {towers['clip']} --reward-margin 2 --max-train-steps 3"
    ended = trainer.ends("alone", f"{alone} --cold-start-iter 2")
    assert ended.code == EXIT_USER
    assert "nothing to train at step 0, rewards begin at 2" in ended.err
    stage = trainer.run("stage", f"{alone} --cold-start-iter 2 --resume-ckpt {record(first, 2)}")
    (line,) = tiny.log_lines(stage)
    assert line["loss_dmd"] is None
    assert line["loss"] == pytest.approx(0.3 * line["loss_clip"], rel=1e-5)
    assert not equal(weights(first, 2), weights(stage, 3))


# -- initial weights of a generator ----------------------------------------------------------------------------------


def state_of(root: Path) -> dict[str, torch.Tensor]:
    return weights(root, 1)


@pytest.mark.parametrize("kind", ["folder", "pipeline", "state dict", "safetensors"])
def test_a_generator_starts_from_weights(trainer, sdxl_folder_3, tmp_path, kind):
    from safetensors.torch import load_file, save_file

    (file,) = (sdxl_folder_3 / "unet").glob("*.safetensors")
    state = load_file(file)
    source = {"folder": sdxl_folder_3 / "unet", "pipeline": sdxl_folder_3}.get(kind, tmp_path / "state.bin")
    if kind == "state dict":
        torch.save(state, source)
    elif kind == "safetensors":
        save_file(state, source := tmp_path / "state.safetensors")
    run = trainer.run(
        "run", f"--xl-ode-pretrain-path {source} --learning-rate-gen 0 --batch-size 1 --max-train-steps 1"
    )
    assert equal(weights(run, 1), state)


def test_a_generator_starts_from_a_lora(trainer, sdxl_folder, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    base = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"]))
    tiny.shake(pipe.unet, "lora_", size=0.1)
    lora = get_peft_model_state_dict(pipe.unet)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=lora)
    run = trainer.run("run", f"--generator-init {tmp_path} --learning-rate-gen 0 --batch-size 1 --max-train-steps 1")
    found = weights(run, 1)
    for key, value in base.items():
        stem = key.removesuffix(".weight")
        if (down := lora.get(f"{stem}.lora_A.weight")) is not None:
            up = lora[f"{stem}.lora_B.weight"]
            value = value + (up.flatten(1) @ down.flatten(1)).reshape(value.shape)
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_a_generator_starts_from_the_lora_of_a_run(trainer, sdxl_folder):
    """The adapter folder that a LoRA run exports is an existing few-step LoRA like any other."""
    lora = trainer.run("lora", "--use-lora-gen --batch-size 1 --max-train-steps 1 --learning-rate-gen 1e-2")
    source = lora / "checkpoints" / "lora_gen" / "step-1"
    run = trainer.run("run", f"--generator-init {source} --learning-rate-gen 0 --batch-size 1 --max-train-steps 1")
    saved, found = weights(lora, 1), weights(run, 1)
    base = load_family("auto", str(sdxl_folder)).load(torch.float32).state_dict()
    moved = 0
    for key, value in base.items():
        stem = key.removesuffix(".weight")
        if (down := saved.get(f"{stem}.lora_A.generator.weight")) is not None:
            delta = 2 * saved[f"{stem}.lora_B.generator.weight"].flatten(1) @ down.flatten(1)  # alpha 4R, rank 2R
            moved += int(delta.abs().max() > 1e-4)
            value = value + delta.reshape(value.shape)
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert moved > 20


LORAS = {  # not of this model, in the names of peft and in those of other trainers
    "lora of another model": [f"unet.nothing.lora_{x}.weight" for x in "AB"],
    "lora of a kind that nobody converts": ["lora_unet_nothing.hada_w1_a", "lora_unet_nothing.lora_down.weight"],
    "lora without its other half": ["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"],
    "lora of a block that is no number": ["lora_unet_input_blocks_x_1_proj_in.lora_down.weight"],
}


@pytest.mark.parametrize("kind", ["absent", "another model", *LORAS])
def test_weights_that_do_not_fit_are_one_line(trainer, sdxl_folder_2, tmp_path, kind):
    from safetensors.torch import save_file

    source = {"absent": tmp_path / "absent", "another model": sdxl_folder_2}.get(kind, tmp_path / "lora.safetensors")
    if kind in LORAS:
        save_file({key: torch.ones(2, 2) for key in LORAS[kind]}, source)
    ended = trainer.ends("run", f"--generator-init {source}")
    assert ended.code == EXIT_USER
    assert str(source) in ended.err
    assert "Traceback" not in ended.err


# -- what is written -------------------------------------------------------------------------------------------------


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


PART = {f"{name}.{kind}" for name, kind in (("model", "safetensors"), ("optimizer", "safetensors"))}
PART |= {"optimizer.json", "scaler.json"}
EXPORT = {"adapter_model.safetensors", "adapter_config.json"}
SHEET = {"grid.png", "prompts.txt", "student_000.png", "student_001.png"}


@pytest.mark.parametrize("lora", [False, True])
def test_the_output_tree(trainer, lora):
    run = trainer.run("run", "--sample-steps 2 --checkpoint-steps 1" + (" --use-lora-gen" if lora else ""))
    expected = {"args.json", "log.txt", ".lock", ".exit_code"}
    expected |= {f"loss_logs/loss_{role}_log.jsonl" for role in ("gen", "gui")}
    for step in (1, 2):
        expected |= {f"checkpoints/torch_units/step-{step}.pt"}
        expected |= {f"checkpoints/accelerator_{n}/step-{step}/{file}" for n in (1, 2) for file in PART}
        adapters = ("lora_gen", "lora_gui") if lora else ("lora_gui",)
        expected |= {f"checkpoints/{name}/step-{step}/{file}" for name in adapters for file in EXPORT}
    expected |= {f"samples/step {step}/{file}" for step in (0, 2) for file in SHEET}
    assert tree(run) == expected
    assert (run / ".exit_code").read_text() == "0\n"


def test_logs_are_json_lines_with_fixed_keys(trainer, towers):
    run = trainer.run("run", RL.format(**towers) + " --max-train-steps 3")
    counters, common = ["tick", "step", "samples_seen"], ["grad_norm", "lr", "skipped", "seconds_tick"]
    rewards = ["reward_clip", "loss_clip", "reward_hps", "loss_hps"]
    columns = {"gen": ["loss", "loss_dmd", "score_gap", *rewards], "gui": ["loss"]}
    for role, ticks in (("gen", [2, 4, 6]), ("gui", [1, 2, 3, 4, 5, 6])):
        text = (run / "loss_logs" / f"loss_{role}_log.jsonl").read_text()
        lines = [
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            for line in text.splitlines()
        ]
        assert [line["tick"] for line in lines] == ticks
        assert [line["samples_seen"] for line in lines] == [2 * tick for tick in ticks]
        assert [line["step"] for line in lines] == [tick // 2 for tick in ticks]
        assert all(list(line) == [*counters, *columns[role], *common] for line in lines)
        assert all(line["seconds_tick"] > 0 and line["grad_norm"] > 0 and line["skipped"] == 0 for line in lines)


def test_args_json_holds_every_setting_as_it_was_understood(trainer, sdxl_folder):
    run = trainer.run("run", "--batch-size 1 --max-train-steps 1")
    args = json.loads((run / "args.json").read_text())
    assert args.keys() - {"code_version"} == set(fields_of("dmdr"))
    assert args["layout"] == "paired"
    assert args["model_family"] == "sdxl"
    assert args["pretrained_model"] == str(sdxl_folder)
    assert args["learning_rate_gen"] == 1e-3


def test_a_second_run_in_a_folder_is_refused(trainer, first):
    before = {path: (first / path).read_bytes() for path in tree(first) - {".exit_code"}}
    ended = trainer.ends("first", "--batch-size 1")
    assert ended.code == EXIT_USER
    assert "already holds a run" in ended.err
    assert "--auto-resume" in ended.err
    assert {path: (first / path).read_bytes() for path in tree(first) - {".exit_code"}} == before


def test_a_stage_does_not_write_over_a_run(trainer, first):
    """Launchers always name the stage before: a second start with other settings is no reason to lose the first."""
    flags = f"--batch-size 1 --resume-ckpt {record(first, 2)} --max-train-steps 3"
    stage = trainer.run("stage", flags)
    before = {path: (stage / path).read_bytes() for path in tree(stage) - {".exit_code"}}
    ended = trainer.ends("stage", f"{flags} --learning-rate-gen 1e-2")
    assert ended.code == EXIT_USER
    assert "already holds a run" in ended.err
    assert {path: (stage / path).read_bytes() for path in tree(stage) - {".exit_code"}} == before


def test_a_run_without_an_intact_checkpoint_is_not_started_anew(trainer, first):
    record(first, 2).write_bytes(b"torn")
    ended = trainer.ends("first", "--batch-size 1 --auto-resume")
    assert ended.code == EXIT_USER
    assert "no checkpoint of this run is intact" in ended.err
    assert tiny.log_lines(first)


def test_a_stage_without_a_step_to_make_is_refused(trainer, first):
    ended = trainer.ends("stage", f"--batch-size 1 --resume-ckpt {record(first, 2)} --max-train-steps 2")
    assert ended.code == EXIT_USER
    assert "--max-train-steps 2" in ended.err
    assert "above 2" in ended.err


def test_a_finished_run_is_left_as_it_is(trainer, first):
    again = trainer.run("first", "--batch-size 1 --auto-resume")
    assert RunFolder(again).steps() == [2]
    assert len(tiny.log_lines(again)) == 2


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ("", [3]),
        ("--checkpoint-steps 2", [3, 2]),
        ("--checkpoint-steps 1 --checkpoints-total-limit 2", [3, 2]),
        ("--checkpoint-minutes 1e-9", [3, 2, 1]),
    ],
)
def test_when_checkpoints_are_saved(trainer, more, steps):
    """The last step always is."""
    run = trainer.run("run", f"--max-train-steps 3 --batch-size 1 {more}", "ode")
    assert RunFolder(run).steps() == steps
    assert all(RunFolder(run).damage(record(run, step)) is None for step in steps)


def test_minutes_count_from_the_last_save(trainer, monkeypatch):
    from train_t2i import log, resume, run, train

    clock, flush = SimpleNamespace(now=time.monotonic()), log.RunLog.flush
    for module in (train, resume, run):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now), raising=False)

    def forty_seconds_later(self, *counters):
        clock.now += 40
        flush(self, *counters)

    monkeypatch.setattr(log.RunLog, "flush", forty_seconds_later)
    made = trainer.run("run", "--max-train-steps 5 --batch-size 1 --checkpoint-minutes 1", "ode")
    assert RunFolder(made).steps() == [5, 4, 2]


def test_the_logs_of_a_first_attempt_that_saved_nothing_are_cut(trainer):
    whole = trainer.run("whole", "--max-train-steps 2", "ode")
    logs = trainer.root / "again" / "loss_logs"
    logs.mkdir(parents=True)
    shutil.copy(whole / "loss_logs" / "loss_gen_log.jsonl", logs)
    (logs / "loss_gui_log.jsonl").write_text('{"tick": 1')
    again = trainer.run("again", "--max-train-steps 2 --auto-resume", "ode")
    tiny.assert_same_logs(whole, again)


def test_a_torn_line_is_cut(trainer, first):
    for name in ("gen", "gui"):
        with open(first / "loss_logs" / f"loss_{name}_log.jsonl", "a") as file:
            file.write('{"tick": 5, "step')
    again = trainer.run("first", "--batch-size 1 --auto-resume --max-train-steps 3")
    assert [line["tick"] for line in tiny.log_lines(again, "guidance")] == [1, 2, 3, 4, 5, 6]


# -- sample sheets ---------------------------------------------------------------------------------------------------


def test_sampling_does_not_change_training(trainer):
    flags = "--max-train-steps 3 --checkpoint-steps 1 --sample-num-steps 2"
    plain, sampled = (
        trainer.run("plain", flags),
        trainer.run("sampled", f"{flags} --sample-steps 1 --batch-size-test 3"),
    )
    tiny.assert_same_checkpoint(plain, sampled, 3)
    tiny.assert_same_logs(plain, sampled)


def test_sheets_have_the_same_noise_and_prompts_every_time_and_the_teacher_beside(trainer, prompts_file):
    still = trainer.run("still", "--learning-rate-gen 0 --learning-rate-gui 0 --sample-steps 1 --sample-num-steps 2")
    sheets = [still / "samples" / f"step {step}" for step in range(3)]
    for sheet in sheets[1:]:
        for file in SHEET:
            assert (sheet / file).read_bytes() == (sheets[0] / file).read_bytes(), (sheet.name, file)
    assert (sheets[0] / "prompts.txt").read_text().splitlines() == prompts_file.read_text().splitlines()[:2]
    assert (sheets[0] / "student_000.png").read_bytes() != (sheets[0] / "student_001.png").read_bytes()
    student, grid = Image.open(sheets[0] / "student_000.png"), Image.open(sheets[0] / "grid.png")
    assert student.size == (32, 32)
    assert grid.size == (2 * 34 + 2, 2 * 34 + 2)  # student above, teacher below
    assert grid.crop((2, 2, 34, 34)).tobytes() == student.tobytes()
    moved = trainer.run("moved", "--sample-steps 2 --learning-rate-gen 1e-2 --sample-num-steps 2")
    grids = [Image.open(moved / "samples" / f"step {step}" / "grid.png") for step in (0, 2)]
    students, teachers = ([g.crop((0, top, 70, top + 34)).tobytes() for g in grids] for top in (2, 36))
    assert students[0] != students[1]
    assert teachers[0] == teachers[1]


def test_sheets_of_methods_without_a_teacher_and_prompts_of_ones_own(trainer, tmp_path):
    (tmp_path / "own.txt").write_text("one\n\ntwo\nthree\n")
    run = trainer.run("run", f"--sample-steps 1 --sample-prompts {tmp_path / 'own.txt'} --max-train-steps 1", "ode")
    sheet = run / "samples" / "step 1"
    assert (sheet / "prompts.txt").read_text() == "one\ntwo\n"
    assert Image.open(sheet / "grid.png").size == (2 * 34 + 2, 34 + 2)


# -- updates that are not finite -------------------------------------------------------------------------------------


def poisoned(monkeypatch, kind: str, at) -> None:
    """The distribution matching loss of the updates in ``at`` (counted from 0) is or becomes not finite."""
    dmd, updates = losses.dmd, iter(range(100))

    def loss(x0, real, fake):
        value = dmd(x0, real, fake)
        if next(updates) not in at:
            return value
        if kind == "loss":
            return value * float("nan")
        return value + (x0 - x0.detach()).sum().abs().sqrt()  # finite, with an infinite slope

    monkeypatch.setattr(losses, "dmd", loss)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_counted_and_logged(trainer, monkeypatch, kind):
    clean = trainer.run("clean", "--checkpoint-steps 1 --max-train-steps 3")
    poisoned(monkeypatch, kind, {1})
    run = trainer.run("run", "--checkpoint-steps 1 --max-train-steps 3")
    assert [line["skipped"] for line in tiny.log_lines(run)] == [0, 1, 0]
    assert [line["step"] for line in tiny.log_lines(run)] == [1, 2, 3]  # it counts as a step
    assert [line["skipped"] for line in tiny.log_lines(run, "guidance")] == [0] * 6
    bad = tiny.log_lines(run)[1]
    assert bad["grad_norm"] is None
    assert (bad["loss"] is None) == (kind == "loss")
    files = [dict(tiny.checkpoint_files(run, step)) for step in (1, 2, 3)]
    for name in ("accelerator_1/model.safetensors", "accelerator_1/optimizer.safetensors"):
        assert equal(files[0][name], files[1][name])  # the weights and the optimizer are as they were
        assert not equal(files[1][name], files[2][name])
    assert equal(weights(clean, 1), weights(run, 1))
    assert not equal(weights(clean, 2), weights(run, 2))
    assert all(torch.isfinite(value).all() for value in weights(run, 3).values())
    assert "generator update skipped (1 in a row)" in (run / "log.txt").read_text()


def test_too_many_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(trainer, monkeypatch):
    """Also where the guidance network's updates between them are fine."""
    poisoned(monkeypatch, "loss", range(1, 100))
    ended = trainer.ends("run", "--checkpoint-steps 1 --max-train-steps 9 --max-skipped 3")
    assert ended.code == EXIT_NON_FINITE
    run = trainer.root / "run"
    assert RunFolder(run).steps() == [3, 2, 1]
    assert "3 non-finite generator updates in a row" in ended.err
    assert str(record(run, 3)) in ended.err
    assert "Traceback" not in ended.err
    assert (run / ".exit_code").read_text() == f"{EXIT_NON_FINITE}\n"
    assert equal(weights(run, 1), weights(run, 3))


def test_a_good_update_starts_the_count_again_and_a_resume_does_not(trainer, monkeypatch):
    poisoned(monkeypatch, "loss", {0, 2, 3})
    trainer.run("run", "--max-train-steps 4 --max-skipped 3")
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    poisoned(monkeypatch, "loss", range(100))
    ended = trainer.ends("run", "--max-train-steps 9 --max-skipped 3 --auto-resume")
    assert ended.code == EXIT_NON_FINITE
    assert "stopped at step 4" in ended.err  # two were counted before


def test_nothing_saved_yet(trainer, monkeypatch):
    poisoned(monkeypatch, "loss", range(100))
    ended = trainer.ends("run", "--max-skipped 1")
    assert ended.code == EXIT_NON_FINITE
    assert "no checkpoint was saved" in ended.err


# -- a full disk -----------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_in_a_log_ends_in_one_line(trainer, monkeypatch):
    def full(*args, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("train_t2i.log.RunLog._write", full)
    ended = trainer.ends("run", "", "ode")
    assert ended.code == EXIT_DISK
    assert "No space left on device" in ended.err
    assert "Traceback" not in ended.err


def test_an_error_of_ours_is_not_hidden(trainer, monkeypatch):
    def wrong(*args, **options):
        raise OSError(5, "something else")

    monkeypatch.setattr("train_t2i.log.RunLog._write", wrong)
    with pytest.raises(OSError, match="something else"):
        trainer.ends("run", "", "ode")
    assert (trainer.root / "run" / ".exit_code").read_text() == "-1\n"


def test_the_marker_never_tells_of_an_earlier_run(trainer, first, monkeypatch):
    monkeypatch.setattr("train_t2i.train.prepare_and_loop", lambda *args: os._exit(9))  # killed in the middle
    pid = os.fork()
    if pid == 0:
        trainer.ends("first", "--batch-size 1 --auto-resume")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not (first / ".exit_code").exists()


# -- learning rates --------------------------------------------------------------------------------------------------


def test_rates_are_a_function_of_the_step():
    def rates(steps, **run):
        settings = Settings(Config(learning_rate_gen=1.0, **run), DMDRConfig(learning_rate_gui=0.5))
        generator = [learning_rate(settings, "generator", step) for step in steps]
        guidance = [learning_rate(settings, "guidance", step) for step in steps]
        assert guidance == [pytest.approx(rate / 2) for rate in generator]
        return generator

    assert rates([0, 5, 99]) == [1, 1, 1]
    assert rates([0, 1, 3, 4], lr_warmup_steps=4) == [0.25, 0.5, 1, 1]
    cosine = rates([0, 5, 10, 11], lr_scheduler="cosine", max_train_steps=10)
    assert cosine == [1, pytest.approx(0.5), 0, 0]
    both = rates([0, 2, 6, 10], lr_scheduler="cosine", lr_warmup_steps=2, max_train_steps=10)
    assert both == [0.5, 1, pytest.approx(0.5), 0]
    settings = Settings(Config(learning_rate_gen=1.0, lr_scheduler="cosine", max_train_steps=30), DMDRConfig())
    assert [learning_rate(settings, "generator", step, 20) for step in (20, 25, 30)] == [1, pytest.approx(0.5), 0]


def test_the_rate_of_the_step_is_used_and_logged(trainer):
    run = trainer.run("run", "--lr-warmup-steps 4 --max-train-steps 3 --ratio-update 2")
    assert [line["lr"] for line in tiny.log_lines(run)] == [2.5e-4, 5e-4, 7.5e-4]
    assert [line["lr"] for line in tiny.log_lines(run, "guidance")] == [2.5e-4, 2.5e-4, 5e-4, 5e-4, 7.5e-4, 7.5e-4]


def test_a_stage_warms_up_from_its_own_first_step_also_when_it_is_continued(trainer, first):
    flags = f"--batch-size 1 --lr-warmup-steps 4 --resume-ckpt {record(first, 2)} --auto-resume"
    stage = trainer.run("stage", f"{flags} --max-train-steps 4")
    trainer.run("stage", f"{flags} --max-train-steps 5")
    assert [line["lr"] for line in tiny.log_lines(stage)] == [2.5e-4, 5e-4, 7.5e-4]


# -- the engine ------------------------------------------------------------------------------------------------------


def engine_of(precision: str = "no", max_grad_norm: float = 1.0, **adam):
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    engine = Engine(precision, max_grad_norm)
    settings = AdamSettings(0.1, (0.9, 0.999), 1e-8, 0.0, False)
    engine.prepare("generator", [parameter], settings)
    return engine, parameter


@pytest.mark.parametrize(("limit", "expected"), [(1.0, (0.6, 0.8)), (0.0, (3.0, 4.0)), (9.0, (3.0, 4.0))])
def test_gradients_are_clipped_to_the_norm_that_was_set(monkeypatch, limit, expected):
    """The published flag did nothing."""
    engine, parameter = engine_of(max_grad_norm=limit)
    seen = []
    monkeypatch.setattr(engine.optimizers["generator"], "step", lambda: seen.append(parameter.grad.tolist()))
    engine.backward("generator", (torch.tensor([3.0, 4.0]) * parameter).sum())
    report = engine.step("generator")
    assert report.grad_norm == pytest.approx(5)
    assert seen == [pytest.approx(expected, rel=1e-4)]
    assert parameter.grad is None


def test_fp16_loss_scale_falls_once_an_overflow_and_survives_a_checkpoint():
    engine, parameter = engine_of("fp16")
    scaler = engine.scalers["generator"]
    for scale, finite in ((65536.0, True), (65536.0, False), (32768.0, False), (16384.0, True)):
        assert scaler.get_scale() == scale
        before = parameter.detach().clone()
        engine.backward("generator", parameter.sum() * (1.0 if finite else float("inf")))
        report = engine.step("generator")
        assert report.skipped is not finite
        assert torch.equal(parameter, before) is not finite
        assert not finite or report.grad_norm == pytest.approx(2**0.5, rel=1e-3)
    state = engine.scaler_state("generator")
    assert state["_growth_tracker"] == 1  # counted anew after the overflow
    other, _ = engine_of("fp16")
    other.load_scaler_state("generator", json.loads(json.dumps(state)))
    assert other.scalers["generator"].get_scale() == 16384.0
    other.load_scaler_state("generator", {})  # a stage whose checkpoint was not made in fp16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(trainer, precision):
    flags = f"--mixed-precision {precision} --batch-size 1 --checkpoint-steps 1"
    whole = trainer.run("whole", flags)
    lines = tiny.log_lines(whole)
    assert all(line["skipped"] == 0 and line["loss"] > 0 for line in lines)
    assert {value.dtype for value in weights(whole, 2).values()} == {torch.float32}
    stopped_at(whole, 1, "again")
    tiny.assert_same_checkpoint(whole, trainer.run("again", f"{flags} --resume-ckpt latest"), 2)


def test_a_launch_that_starts_too_few_processes_is_refused(monkeypatch):
    """accelerate launch --cpu --num_processes 2 starts one and says nothing."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    Engine("no", 1.0)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="starts one"):
        Engine("no", 1.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes but 1"):
        Engine("no", 1.0)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launch_that_asks_for_more_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match="FSDP or DeepSpeed"):
        Engine("no", 1.0)


def test_eight_bit_adam_names_what_it_needs(trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if the extra were not installed
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    ended = trainer.ends("run", "--use-8bit-adam", "ode")
    assert ended.code == EXIT_USER
    assert "--use-8bit-adam needs bitsandbytes" in ended.err


# -- data in other processes -----------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_is_one_line_from_a_reading_process(trainer, tmp_path):
    table = tiny.save_images(tmp_path / "images", count=2)
    (table.parent / "1.png").write_bytes(b"\x89PNG broken")
    ended = trainer.ends("run", f"--data-path-train {table} --num-workers 1 --batch-size-test 1", "sft")
    assert ended.code == EXIT_USER
    assert "1.png" in ended.err
    assert "Traceback" not in ended.err


def test_reading_processes_change_nothing(trainer):
    alone = trainer.run("alone", "--num-workers 0", "sft")
    tiny.assert_same_checkpoint(alone, trainer.run("helped", "--num-workers 2", "sft"), 2)


def test_done_is_zero(first):
    assert (first / ".exit_code").read_text() == f"{EXIT_DONE}\n"
