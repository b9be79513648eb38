"""What a run's settings must hold: every value within its bounds, nothing that cannot work, nothing that does nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from train_t2i.acting_flags import CONDITIONAL
from train_t2i.config import (
    LAYOUTS,
    Config,
    DirectConfig,
    DMDRConfig,
    Settings,
    SFTConfig,
    any_of,
    fields_of,
    listed,
    resolved_layout,
)
from train_t2i.errors import UserError
from train_t2i.rates import LOWEST
from train_t2i.reward_flags import monitor_paths, wanted_rewards


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
        _check_guard(run, settings.method)
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
    if settings.run.offload_optimizer and backend in ("zero2", "zero3"):
        raise UserError(
            f"--offload-optimizer does not go with --backend {backend}: DeepSpeed steps by itself on state that it has cut",
            "use --backend ddp or fsdp2",
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
    if method.reuse_rollout and run.sample_type == "ode":
        raise UserError(
            "--reuse-rollout does not go with --sample-type ode, whose guidance network learns finished samples",
            "set --sample-type sde",
        )
    _check_draw("gen", method.s_type_gen, method.gen_a)
    _check_draw("gui", method.s_type_gui, method.gui_a)
    given = wanted_rewards(method)
    wanted = method.reward_clip_weight > 0 or method.reward_hps_weight > 0
    if not given and wanted and method.cold_start_iter < run.max_train_steps:
        raise UserError(
            f"rewards begin at step {method.cold_start_iter} but no reward model is given",
            "give --clip-reward-model, --hpsv2-reward-model or --extra-rewards, or set both reward weights to 0, "
            "or --cold-start-iter to --max-train-steps",
        )
    if method.dmd_weight == 0 and not any(one.weight for one in given):
        raise UserError(
            "--dmd-weight 0 without a reward trains nothing", "give a reward model and its weight, or --dmd-weight 1"
        )


def _check_guard(run: Config, method: DMDRConfig) -> None:
    guard, monitored = method.reward_guard, monitor_paths(method)
    if guard == "off":
        return
    if not monitored:
        raise UserError(f"--reward-guard {guard} has nothing to judge by", "give --monitor-rewards NAME=PATH")
    if not run.sample_steps:
        raise UserError(f"--reward-guard {guard} looks at every --sample-steps, which is 0", "set it")
    if guard == "stop" and not run.checkpoint_steps:
        raise UserError(
            "--reward-guard stop names the last good checkpoint, and --checkpoint-steps 0 leaves none",
            "set --checkpoint-steps, best to a multiple of --sample-steps",
        )
    if guard == "scale" and method.dmd_weight == 0:
        raise UserError(
            "--reward-guard scale with --dmd-weight 0: Adam's steps do not depend on the scale of the only loss",
            "take stop, or give the rewards something to be weighed against",
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
