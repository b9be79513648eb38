"""Flags that act only beside others: when each does, and what a user is told where it would do nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train_t2i.config import EDIT_FAMILIES, LAYOUTS, parse_resolution
from train_t2i.sizes import side_divisors

Values = Any  # every setting of a run by name, its layout resolved


@dataclass(frozen=True)
class Acts:
    """A flag, when it acts, and what a user is told where it does not."""

    name: str
    when: Callable[[Values], bool]
    otherwise: str  # "--NAME does nothing ..."
    way_out: str  # "leave it out, or ..."


def _few_steps(v: Values) -> bool:
    return v.method != "sft" and (v.sample_num_steps > 1 or _rows_differ(v))


def _rows_differ(v: Values) -> bool:
    return v.method == "direct" and v.max_row_steps > 0


def _guided(v: Values) -> bool:
    return v.distill_cfg > 1 if v.method == "arcflow" else v.cfg_r > 1 or v.cfg_f > 1


def sees_images(v: Values) -> bool:
    """Whether a loss looks at decoded images.  ``v``: every setting by name."""
    return _rewarded(v) or (v.method == "direct" and bool(v.feature_model))


def _of_images_alone(v: Values) -> bool:
    return v.gradient_checkpointing in ("decoder", "rewards", "decoder+rewards")


def _rewarded(v: Values) -> bool:
    return v.method == "dmdr" and bool(v.clip_reward_model or v.hpsv2_reward_model or v.extra_rewards)


def _edits(v: Values) -> bool:
    """What ``auto`` stands for is known later, when this is asked again."""
    return v.model_family in ("auto", *EDIT_FAMILIES)


def _reads_images(v: Values) -> bool:
    return v.method in ("direct", "sft") or _edits(v)


def _leaves_out_rows(v: Values) -> bool:
    return v.method == "sft" or (v.method != "direct" and _edits(v))


def _side_varies(v: Values) -> bool:
    height, width = parse_resolution(v.resolution)
    return bool(side_divisors(math.sqrt(height * width)))


def _guidance_is_lora(v: Values) -> bool:
    return v.method == "dmdr" and LAYOUTS[v.layout]["guidance"][1] is not None


def _keeps_frozen(v: Values) -> bool:
    return v.use_lora_gen or v.method not in ("direct", "sft")


NO_IMAGES = ("where the data is prompts alone", "train an edit model, or take --method sft or direct")
NO_EDITS = ("for models that edit nothing", "set --model-family")
NO_SEEN = ("but for qwen_image_edit_plus, whose text encoder sees sources of their own size", "set --source-size")
ONE_STEP = ("on one step", "distil (dmdr, direct) with --sample-num-steps above 1")
NO_TEACHER = (
    "with --method direct, which runs no teacher",
    "give it to python -m train_t2i pairs (--num-inference-steps, --cfg-scale)",
)
NO_REWARD = ("without a reward model", "give --clip-reward-model or --hpsv2-reward-model (--method dmdr)")
NO_LOGIT = ("without it", "set --weighting-scheme logit_normal")
MODULES = ("trainable_modules", "trainable_modules_low_learning_rate")
NO_CLIP = ("without --clip-reward-model", "give that model")
NO_HPS = ("without --hpsv2-reward-model", "give that model")
NO_MONITOR = ("without --monitor-rewards", "give them")
NO_GUARD = ("without --reward-guard", "set it to warn, scale or stop")
UNIFORM_GEN = ("with --s-type-gen uniform", "set --s-type-gen beta or logit_normal")
UNIFORM_GUI = ("with --s-type-gui uniform", "set --s-type-gui beta or logit_normal")

# Flags that act only beside others.  A part that is switched off for a while by a flag of its own (--sample-steps 0,
# --dmd-weight 0, --cold-start-iter at the last step, a reward's weight 0) does not make its settings wrong.
CONDITIONAL = (
    Acts("lr_num_cycles", lambda v: v.lr_scheduler == "cosine_with_restarts", "without restarts", "set --lr-scheduler cosine_with_restarts"),
    Acts("lr_power", lambda v: v.lr_scheduler == "polynomial", "without a power", "set --lr-scheduler polynomial"),
    Acts("num_train_epochs", lambda v: v.method in ("direct", "sft"), "with prompts, of which each is seen once at most", "set --max-train-steps"),
    Acts("sample_num_steps", lambda v: v.method != "sft", "with --method sft", "set --teacher-num-steps"),
    Acts("sample_type", lambda v: v.method != "arcflow", "with --method arcflow, whose steps have ways of their own", "take dmdr or direct"),
    Acts("sample_type", _few_steps, *ONE_STEP),
    Acts("shift", lambda v: v.method == "sft" or _few_steps(v), *ONE_STEP),
    Acts("logit_mean", lambda v: v.weighting_scheme == "logit_normal", *NO_LOGIT),
    Acts("logit_std", lambda v: v.weighting_scheme == "logit_normal", *NO_LOGIT),
    Acts("mode_scale", lambda v: v.weighting_scheme == "mode", "without it", "set --weighting-scheme mode"),
    Acts(
        "uniform_sampling",
        lambda v: v.weighting_scheme not in ("logit_normal", "mode"),
        "where --weighting-scheme draws the times",
        "choose one that weighs losses (sigma_sqrt, cosmap) or none",
    ),
    *(Acts(name, lambda v: not v.use_lora_gen, "with --use-lora-gen, whose layers --lora-targets names", "set --lora-targets") for name in MODULES),
    Acts("source_size", _edits, *NO_EDITS),
    Acts("source_seen_size", lambda v: v.model_family in ("auto", "qwen_image_edit_plus"), *NO_SEEN),
    Acts("train_data_dir", _reads_images, *NO_IMAGES),
    Acts("max_bad_fraction", _leaves_out_rows, "where every row of the data counts", "take --method sft"),
    Acts("num_workers", _reads_images, *NO_IMAGES),
    Acts("random_hw_adapt", lambda v: v.enable_bucket, "without --enable-bucket", "give that flag"),
    Acts("random_hw_adapt", _side_varies, "below --resolution 768", "raise --resolution"),
    Acts("lora_targets", lambda v: v.use_lora_gen or _guidance_is_lora(v), "where nothing trained is a LoRA", "give --use-lora-gen"),
    Acts("lora_rank", lambda v: v.use_lora_gen or _guidance_is_lora(v), "where nothing trained is a LoRA", "give --use-lora-gen"),
    Acts("base_quant", _keeps_frozen, "where all that is loaded is trained in full", "give --use-lora-gen"),
    Acts("tiny_vae", sees_images, *NO_REWARD),
    Acts("gradient_checkpointing", lambda v: sees_images(v) or not _of_images_alone(v), "for images that no loss sees", "give it networks, or a reward model"),
    Acts("teacher_num_steps", lambda v: v.method != "direct", *NO_TEACHER),
    Acts("teacher_cfg", lambda v: v.method != "direct", *NO_TEACHER),
    Acts("lora_scale_f", _guidance_is_lora, "with a layout that has no guidance adapter", "choose another --layout"),
    Acts("lora_scale_r", lambda v: v.dynamic_step > 0, "with --dynamic-step 0", "set --dynamic-step"),
    Acts(
        "dynamic_step",
        lambda v: v.lora_scale_r > 0 or "beta" in (v.s_type_gen, v.s_type_gui),
        "with --lora-scale-r 0 and no times drawn from a beta",
        "set --s-type-gui beta",
    ),
    Acts("s_type_gen", _few_steps, *ONE_STEP),
    Acts("student_input", _few_steps, *ONE_STEP),
    Acts("student_input", lambda v: v.sample_type == "ode", "where sampling noises anew too", "set --sample-type ode"),
    Acts("gen_a", lambda v: v.s_type_gen != "uniform", *UNIFORM_GEN),
    Acts("gen_b", lambda v: v.s_type_gen != "uniform", *UNIFORM_GEN),
    Acts("gui_a", lambda v: v.s_type_gui != "uniform", *UNIFORM_GUI),
    Acts("gui_b", lambda v: v.s_type_gui != "uniform", *UNIFORM_GUI),
    Acts(
        "negative_prompt",
        lambda v: _guided(v) or (v.teacher_cfg > 1 and v.sample_steps > 0),
        "without guidance, neither in the scores nor in the teacher's sample images",
        "set --cfg-r (arcflow: --distill-cfg) above 1",
    ),
    Acts("temperature", lambda v: v.policy == "gmflow", "with --policy momentum", "set --policy gmflow"),
    Acts("momentum_rate", lambda v: v.policy == "momentum", "with --policy gmflow", "set --policy momentum"),
    Acts("momentum_rate", lambda v: v.num_components > 1, "with --num-components 1", "set --num-components"),
    Acts("step_checkpointing", _few_steps, *ONE_STEP),
    Acts("backprop_steps", _few_steps, *ONE_STEP),
    Acts("states_weight", lambda v: v.sample_num_steps > 1, *ONE_STEP),
    Acts("feature_weight", lambda v: v.feature_model, "without --feature-model", "give that model"),
    Acts("reward_clip_weight", lambda v: v.clip_reward_model or v.reward_clip_weight == 0, *NO_CLIP),
    Acts("reward_hps_weight", lambda v: v.hpsv2_reward_model or v.reward_hps_weight == 0, *NO_HPS),
    Acts("extra_reward_margin", lambda v: v.extra_rewards, "without --extra-rewards", "give them"),
    Acts("reward_margin", lambda v: v.clip_reward_model or v.hpsv2_reward_model, *NO_REWARD),
    Acts("reward_batch_size", _rewarded, *NO_REWARD),
    Acts("magic_prompt", lambda v: v.hpsv2_reward_model, *NO_HPS),
    Acts("magic_prompt", lambda v: not v.srpo, "with --srpo, which has words of its own", "set --srpo-positive"),
    Acts("srpo", lambda v: v.hpsv2_reward_model, *NO_HPS),
    Acts("monitor_seeds", lambda v: v.monitor_rewards, *NO_MONITOR),
    Acts("monitor_reference", lambda v: v.monitor_rewards, *NO_MONITOR),
    Acts("reward_guard", _rewarded, *NO_REWARD),
    Acts("guard_reward_drop", lambda v: v.reward_guard != "off", *NO_GUARD),
    Acts("guard_diversity_drop", lambda v: v.reward_guard != "off", *NO_GUARD),
    Acts("guard_factor", lambda v: v.reward_guard == "scale", "but for --reward-guard scale", "set that"),
    *(Acts(name, lambda v: v.srpo, "without --srpo", "give --srpo on") for name in ("srpo_k", "srpo_positive", "srpo_negative")),
)  # fmt: skip
