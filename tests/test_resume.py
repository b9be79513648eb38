"""Whole tiny runs that go on: exact resume, stages, what is compared between then and now."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_runs import RL, equal, record, stopped_at, weights

from train_t2i.checkpoint import RunFolder
from train_t2i.config import Config
from train_t2i.errors import EXIT_USER, UserError
from train_t2i.resume import kept_batch

# -- exact resume ----------------------------------------------------------------------------------------------------


CASES = {
    "direct": ("direct", "--sample-num-steps 2"),
    "direct-lora": ("direct", "--use-lora-gen --lora-rank 2 --gradient-accumulation-steps 2"),
    "sft": ("sft", "--caption-dropout 0.5 --cache-rows --lr-scheduler cosine --lr-warmup-steps 2"),
    # cold start to step 2, rewards from then on
    "paired": ("dmdr", RL),
    "shared": ("dmdr", RL + " --use-lora-gen --gradient-accumulation-steps 2 --sample-num-steps 2 --dynamic-step 3"),
    "paired_lora": ("dmdr", RL + " --use-lora-gen --layout paired_lora --generator-init {unet} --s-type-gui beta"),
    "reused": ("dmdr", RL + " --use-lora-gen --sample-num-steps 2 --reuse-rollout"),
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
        ("--method direct", "method: checkpoint='dmdr' now='direct'"),
        ("--lr-scheduler cosine --max-train-steps 9", "lr_scheduler"),
    ):
        method = "direct" if "direct" in more else "dmdr"
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


@pytest.mark.parametrize(
    ("world", "flags", "expected"),
    [
        (3, (8, 1), (8, 1)),  # as saved
        (6, (8, 1), (4, 1)),
        (1, (8, 1), (8, 3)),  # more micro-batches, none of them larger
        (2, (8, 1), (6, 2)),
        (12, (2, 1), (2, 1)),  # other flags that make the same batch
        (1, (12, 2), (12, 2)),
    ],
)
def test_another_number_of_processes_keeps_the_global_batch(world, flags, expected):
    record = {"global_batch": 24, "settings": {"batch_size": 8, "gradient_accumulation_steps": 1}}
    cfg = Config(batch_size=flags[0], gradient_accumulation_steps=flags[1])
    assert kept_batch(cfg, record, world) == expected


@pytest.mark.parametrize(
    ("world", "flags", "told"),
    [
        (7, (8, 1), "24 rows does not divide among 7 processes"),
        (36, (8, 1), "launch 24, the nearest"),
        (9, (8, 1), "launch 8 or 12, the nearest"),
        (3, (4, 1), "--batch-size: 3 processes would make batches of 12 rows, this run's have 24"),
    ],
)
def test_a_global_batch_that_cannot_be_kept_is_refused_with_what_can(world, flags, told):
    record = {"global_batch": 24, "settings": {"batch_size": 8, "gradient_accumulation_steps": 1}}
    with pytest.raises(UserError) as refused:
        kept_batch(Config(batch_size=flags[0], gradient_accumulation_steps=flags[1]), record, world)
    assert told in f"{refused.value.message} {refused.value.hint}"


def test_a_run_without_a_guidance_network_cannot_be_continued_by_dmdr_but_can_start_it(trainer):
    ode = trainer.run("direct", "", "direct")
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
