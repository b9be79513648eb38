"""What a run's settings must hold: every value within its bounds, nothing that cannot work, nothing that does nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from train_t2i.config import (
    EDIT_FAMILIES,
    LAYOUTS,
    Config,
    DirectConfig,
    DMDRConfig,
    Settings,
    SFTConfig,
    any_of,
    fields_of,
    listed,
    parse_resolution,
    resolved_layout,
    reward_weights,
)
from train_t2i.errors import UserError
from train_t2i.rates import LOWEST
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


def _sees_images(v: Values) -> bool:
    return _rewarded(v) or (v.method == "direct" and bool(v.feature_model))


def _rewarded(v: Values) -> bool:
    return v.method == "dmdr" and bool(v.clip_reward_model or v.hpsv2_reward_model)


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
    Acts("tiny_vae", _sees_images, *NO_REWARD),
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
    Acts("reward_margin", _rewarded, *NO_REWARD),
    Acts("magic_prompt", lambda v: v.hpsv2_reward_model, *NO_HPS),
    Acts("magic_prompt", lambda v: not v.srpo, "with --srpo, which has words of its own", "set --srpo-positive"),
    Acts("srpo", lambda v: v.hpsv2_reward_model, *NO_HPS),
    *(Acts(name, lambda v: v.srpo, "without --srpo", "give --srpo on") for name in ("srpo_k", "srpo_positive", "srpo_negative")),
)  # fmt: skip


def check(settings: Settings) -> None:
    """Raise a UserError that names the flag and the fix, for values out of bounds, combinations that cannot work and
    flags that do nothing."""
    run, values = settings.run, settings.as_dict()
    for name, field in fields_of(run.method).items():
        check_bounds(_flag(name), values[name], field.metadata)
    height, width = settings.size_px
    if height % 8 or width % 8:
        raise UserError(
            f"--resolution {run.resolution}: sides must be multiples of 8", "the VAE halves them three times"
        )
    unknown = set(run.report_to.split(",")) - {"jsonl", "wandb", "tensorboard"}
    if unknown:
        raise UserError(f"--report-to {','.join(sorted(unknown))}: unknown", "known: jsonl, wandb, tensorboard")
    if not plain_name(run.exp_name):
        raise UserError(
            f"--exp-name {run.exp_name!r}: not a plain folder name", "name one folder; --output-dir says where it lies"
        )
    check_backend(settings, run.backend)
    _check_length(settings)
    _check_student(run)
    _check_targets(run.lora_targets)
    if isinstance(settings.method, DMDRConfig):
        _check_dmdr(run, settings.method)
    if run.method == "arcflow" and not run.use_lora_gen:
        raise UserError("--method arcflow trains a LoRA and the layers of its head", "give --use-lora-gen")
    if isinstance(settings.method, DirectConfig):
        _check_direct(run, settings.method)
    if isinstance(settings.method, SFTConfig) and settings.method.random_hw_adapt and settings.method.cache_rows:
        raise UserError("--cache-rows does not go with --random-hw-adapt: a row comes in several sizes", "give one")
    check_acts(settings)


def check_bounds(name: str, value: Any, limits: Any) -> None:
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{name} {value}: unknown", f"one of {', '.join(limits['choices'])}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"{name} {value}: not a finite number")
    if limits["low"] is not None and value < limits["low"]:
        raise UserError(f"{name} {value}: must be at least {limits['low']}")
    if limits["above"] is not None and value <= limits["above"]:
        raise UserError(f"{name} {value}: must be above {limits['above']}")
    if limits["below"] is not None and value >= limits["below"]:
        raise UserError(f"{name} {value}: must be below {limits['below']}")
    if limits["high"] is not None and value > limits["high"]:
        raise UserError(f"{name} {value}: must be at most {limits['high']}")


def check_backend(settings: Settings, backend: str) -> None:
    """Raises UserError for what a backend cannot do; ``auto`` is asked again when it is known what it stands for."""
    base_quant = settings.run.base_quant
    if base_quant != "none" and backend in ("fsdp2", "zero2", "zero3"):
        raise UserError(
            f"--base-quant {base_quant} does not go with --backend {backend}: quantised weights are not shared out",
            "use --backend ddp",
        )
    if backend == "zero3" and isinstance(settings.method, DirectConfig) and settings.method.step_checkpointing:
        raise UserError(
            "--step-checkpointing does not go with --backend zero3: weights are given up between forward and backward",
            "use --gradient-checkpointing, or --backend fsdp2",
        )


def plain_name(name: str) -> bool:
    """Whether a folder of this name lies inside the one it is made in, and is not that one."""
    return bool(name.strip()) and name not in (".", "..") and name.isprintable() and not {"/", "\\"} & set(name)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_acts(settings: Settings) -> None:
    """A value other than its default must do something: the defaults are what a published line may always spell out."""
    fields, given = fields_of(settings.run.method), settings.as_dict()
    values = SimpleNamespace(**given | {"layout": resolved_layout(settings.run)})
    for rule in CONDITIONAL:
        if rule.name in fields and given[rule.name] != fields[rule.name].default and not rule.when(values):
            raise UserError(f"{_flag(rule.name)} does nothing {rule.otherwise}", f"leave it out, or {rule.way_out}")


def _check_length(settings: Settings) -> None:
    run, method = settings.run, settings.method
    if run.num_train_epochs and run.max_train_steps != Config().max_train_steps:
        raise UserError("--num-train-epochs and --max-train-steps both say how long to train", "give one")
    if run.lr_scheduler != "polynomial":
        return
    rates = {"--learning-rate-gen": run.learning_rate_gen}
    if isinstance(method, DMDRConfig):
        rates["--learning-rate-gui"] = method.learning_rate_gui
    for name, value in rates.items():
        if value <= LOWEST:
            raise UserError(
                f"{name} {value}: --lr-scheduler polynomial ends at {LOWEST}", "set it higher, or take linear"
            )


def _check_student(run: Config) -> None:
    layout = resolved_layout(run)
    module, adapter = LAYOUTS[layout]["generator"]
    is_lora = adapter is not None
    if run.use_lora_gen != is_lora:
        wanted = "needs" if is_lora else "does not go with"
        raise UserError(f"--layout {layout} {wanted} --use-lora-gen", "or leave --layout at auto")
    if module == LAYOUTS[layout]["teacher"][0] and (run.generator_init or run.xl_ode_pretrain_path):
        source = "--generator-init" if run.generator_init else "--xl-ode-pretrain-path"
        raise UserError(
            f"--layout {layout} cannot take {source}", "the teacher shares its weights: use --layout paired_lora"
        )
    if run.xl_ode_pretrain_path and run.generator_init:
        raise UserError("--generator-init and --xl-ode-pretrain-path both initialise the generator", "give one")
    if run.xl_ode_pretrain_path and run.sample_num_steps != 1:
        raise UserError("--xl-ode-pretrain-path is the start of a one-step student", "use --generator-init")


def _check_targets(text: str) -> None:
    """Each by itself, as a part of the expression it is used in, and beside the others."""
    targets = listed(text)
    for tried in (*((target,) for target in targets), targets):
        try:
            for expression in (*tried, any_of(tried)):
                re.compile(expression)
        except re.error as error:
            told = f"--lora-targets {','.join(tried)}: not a regular expression for the end of a name ({error})"
            raise UserError(told, "e.g. attn.to_q") from None


def _check_dmdr(run: Config, method: DMDRConfig) -> None:
    layout = resolved_layout(run)
    if LAYOUTS[layout]["guidance"][1] is None and method.dynamic_step and method.lora_scale_r:
        raise UserError(
            f"--layout {layout}: the teacher has no guidance adapter to borrow",
            "set --lora-scale-r 0 or --layout paired",
        )
    if method.srpo and not (listed(method.srpo_positive) and listed(method.srpo_negative)):
        raise UserError("--srpo needs words on both sides", "give --srpo-positive and --srpo-negative")
    _check_draw("gen", method.s_type_gen, method.gen_a)
    _check_draw("gui", method.s_type_gui, method.gui_a)
    weights = reward_weights(method)
    on = {name: weight for name, (model, weight) in weights.items() if model}
    wanted = any(weight > 0 for _, weight in weights.values())
    if not on and wanted and method.cold_start_iter < run.max_train_steps:
        raise UserError(
            f"rewards begin at step {method.cold_start_iter} but no reward model is given",
            "give --clip-reward-model or --hpsv2-reward-model, or set both reward weights to 0, "
            "or --cold-start-iter to --max-train-steps",
        )
    if method.dmd_weight == 0 and not any(on.values()):
        raise UserError(
            "--dmd-weight 0 without a reward trains nothing", "give a reward model and its weight, or --dmd-weight 1"
        )


def _check_direct(run: Config, method: DirectConfig) -> None:
    if method.states_weight > 0 and run.sample_num_steps > 1 and run.sample_type != "ode":
        raise UserError(
            "--states-weight: a re-noised student does not pass the teacher's states", "set --sample-type ode"
        )
    if method.states_weight > 0 and method.max_row_steps:
        raise UserError("--states-weight and --max-row-steps: the states are of one number of steps", "give one")
    if method.max_pixels and run.shift == 0:
        raise UserError(
            "--max-pixels with --shift 0: images of several sizes would have grids of their own",
            "give --shift a number",
        )


def _check_draw(name: str, kind: str, first: float) -> None:
    if kind == "beta" and first <= 0:
        raise UserError(f"--{name}-a {first}: a Beta's parameters are above 0")
