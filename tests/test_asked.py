"""What accelerate's launcher asks for: taken, told or refused by name, and what DeepSpeed is given in the end."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from train_t2i.engine import Engine, Flags
from train_t2i.engine.asked import FSDP_TAKEN, Asked, asked, check_blocks, from_file
from train_t2i.engine.backends import FSDP2
from train_t2i.engine.zero import ZeRO
from train_t2i.errors import UserError

ROOT = Path(__file__).parents[1]
FLAGS = Flags("bf16", 0.05, 2, 4)
FSDP = (
    "--use_fsdp --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap=QwenImageTransformerBlock "
    "--fsdp_sharding_strategy FULL_SHARD --fsdp_state_dict_type=SHARDED_STATE_DICT --fsdp_backward_prefetch BACKWARD_PRE "
    "--fsdp_cpu_ram_efficient_loading False"
)  # as published


def environment(line: str) -> dict[str, str]:
    """What accelerate's own launcher gives to the processes."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    flags = f"--num_processes 2 --num_machines 1 --mixed_precision bf16 --dynamo_backend no --main_process_port 0 {line} train.py"
    args = launch_command_parser().parse_args(flags.split())
    before = dict(os.environ)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config, args.num_cpu_threads_per_process = "", 1
        made = prepare_deepspeed_cmd_env(args)[1]
    else:
        args.num_cpu_threads_per_process = 1
        made = prepare_multi_gpu_env(argparse.Namespace(**vars(args)))
    return {name: value for name, value in made.items() if before.get(name) != value}


def of(line: str, backend: str = "auto", flags: Flags = FLAGS, world: int = 2) -> Asked:
    return asked(backend, flags, world, environment(line))


def refused(line: str, named: str, backend: str = "auto") -> None:
    with pytest.raises(UserError) as caught:
        of(line, backend)
    assert named in caught.value.message
    assert caught.value.hint


# -- backends --------------------------------------------------------------------------------------------------------


def test_the_backend_is_the_flag_or_what_the_launchers_config_asks_for() -> None:
    def backend(name: str, **environ: str) -> str:
        return asked(name, Flags(), 2, environ).backend

    assert backend("auto") == "ddp"
    fsdp, deepspeed = {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert [backend(name, **fsdp) for name in ("auto", "zero2")] == ["fsdp2", "zero2"]
    assert [backend(name, **deepspeed) for name in ("auto", "zero2", "ddp")] == ["zero2", "zero2", "ddp"]
    assert backend("auto", **deepspeed, ACCELERATE_DEEPSPEED_ZERO_STAGE="3") == "zero3"
    with pytest.raises(UserError, match="ZeRO stage 1"):
        backend("auto", **deepspeed, ACCELERATE_DEEPSPEED_ZERO_STAGE="1")
    with pytest.raises(UserError, match="--backend zero3, but this launch asks for ZeRO stage 2"):
        backend("zero3", **deepspeed)


def test_the_engine_leaves_the_launchers_word_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    Engine(Flags())
    assert Engine(Flags()).asked.backend == "zero2"


# -- FSDP ------------------------------------------------------------------------------------------------------------


def test_the_published_fsdp_launch_is_taken() -> None:
    found = of(FSDP)
    assert (found.backend, found.blocks) == ("fsdp2", ("QwenImageTransformerBlock",))
    assert len(found.told) == 2
    assert "--fsdp_state_dict_type SHARDED_STATE_DICT" in found.told[1]
    assert of("--use_fsdp --fsdp_version 2").told == ()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--fsdp_sharding_strategy SHARD_GRAD_OP", "--fsdp_sharding_strategy SHARD_GRAD_OP"),
        ("--fsdp_sharding_strategy NO_SHARD", "--fsdp_sharding_strategy NO_SHARD"),
        ("--fsdp_sharding_strategy 2", "--fsdp_sharding_strategy 2"),
        ("--fsdp_reshard_after_forward false", "--fsdp_reshard_after_forward false"),
        ("--fsdp_offload_params true", "--fsdp_offload_params true"),
        ("--fsdp_auto_wrap_policy SIZE_BASED_WRAP", "--fsdp_auto_wrap_policy SIZE_BASED_WRAP"),
        ("--fsdp_backward_prefetch BACKWARD_POST", "--fsdp_backward_prefetch BACKWARD_POST"),
        ("--fsdp_forward_prefetch true", "--fsdp_forward_prefetch true"),
        ("--fsdp_activation_checkpointing true", "--fsdp_activation_checkpointing true"),
        ("--fsdp_activation_checkpointing_offload true", "--fsdp_activation_checkpointing_offload true"),
    ],
)
def test_what_fsdp_does_otherwise_is_refused(more: str, named: str) -> None:
    refused(f"{FSDP} {more}", named)


def test_fsdp_modules_cannot_be_left_out() -> None:
    with pytest.raises(UserError, match="--fsdp_ignored_modules proj is not taken"):
        asked("auto", FLAGS, 2, {"ACCELERATE_USE_FSDP": "true", "FSDP_IGNORED_MODULES": "proj"})


def test_a_class_that_the_model_lacks_is_refused() -> None:
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    check_blocks((), blocks)
    check_blocks(blocks[:1], blocks)
    with pytest.raises(UserError, match="QwenImageTransformerBlock: not a block of this model") as caught:
        check_blocks(("QwenImageTransformerBlock", *blocks), blocks)
    assert "FluxSingleTransformerBlock" in caught.value.hint


def test_networks_are_looked_at_before_they_are_shared_out() -> None:
    backend = FSDP2.__new__(FSDP2)
    backend.blocks_named = ("QwenImageTransformerBlock",)
    with pytest.raises(UserError, match="not a block of this model"):
        backend.place(torch.nn.Linear(2, 2), ("FluxTransformerBlock",))


def test_every_rule_is_a_flag_of_the_launcher() -> None:
    made = environment("--use_fsdp --fsdp_auto_wrap_policy a --fsdp_backward_prefetch b").keys() | {
        "FSDP_IGNORED_MODULES"
    }
    assert {f"FSDP_{name.upper()}" for name in FSDP_TAKEN} <= made


# -- DeepSpeed -------------------------------------------------------------------------------------------------------


def file_of(tmp_path: Path, content: Any) -> str:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def zero(tmp_path: Path, more: dict[str, Any], stage: Any = 2, **section: Any) -> Asked:
    content = {"zero_optimization": {"stage": stage, **section}, **more}
    return of(f"--use_deepspeed --deepspeed_config_file {file_of(tmp_path, content)}")


@pytest.mark.parametrize("stage", [2, 3])
def test_the_published_deepspeed_launches_are_taken(stage: int) -> None:
    file = ROOT / "config" / f"zero_stage{stage}_config.json"
    more = "--zero_stage 3 --zero3_save_16bit_model true --zero3_init_flag true" if stage == 3 else ""
    found = of(f"{more} --use_deepspeed --deepspeed_config_file {file} --deepspeed_multinode_launcher standard")
    assert (found.backend, found.told) == (f"zero{stage}", ())
    taken = json.loads(file.read_text())["zero_optimization"]
    assert found.deepspeed["zero_optimization"] == {
        name: value for name, value in taken.items() if name in found.deepspeed["zero_optimization"]
    }
    assert found.deepspeed["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert taken.keys() - found.deepspeed["zero_optimization"].keys() <= {
        "stage", "offload_optimizer", "offload_param", "stage3_gather_16bit_weights_on_model_save",
    }  # fmt: skip


def test_the_files_that_users_of_videox_fun_have_are_taken(tmp_path: Path) -> None:
    """No clipping in the first, which is filled in; bf16 is told."""
    section = {"overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": 5e8}
    more = {
        "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 2, "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto", "dump_state": True,
    }  # fmt: skip
    found = zero(tmp_path, more, **section)
    assert found.deepspeed == {"dump_state": True, "zero_optimization": section}
    assert len(found.told) == 1
    assert '"bf16" is --mixed-precision bf16' in found.told[0]


def test_a_stage_left_open_is_the_launchers(tmp_path: Path) -> None:
    file = file_of(tmp_path, {"zero_optimization": {"stage": "auto"}})
    assert of(f"--use_deepspeed --deepspeed_config_file {file}").backend == "zero2"
    assert of(f"--use_deepspeed --zero_stage 3 --deepspeed_config_file {file}").backend == "zero3"
    other = file_of(tmp_path, {"zero_optimization": {"stage": 2}})
    refused(f"--use_deepspeed --zero_stage 3 --deepspeed_config_file {other}", "--zero_stage 3, but")
    refused(f"--use_deepspeed --deepspeed_config_file {other}", "--backend zero3", backend="zero3")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping 1.0, but --max-grad-norm 0.05"),
        ({"gradient_clipping": "many"}, "gradient_clipping many"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu 1, but --batch-size 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps 1"),
        ({"train_batch_size": 8}, "train_batch_size 8, but the global batch of 16"),
        ({"fp16": {"enabled": True}}, '"fp16" is enabled, but --mixed-precision bf16'),
        ({"optimizer": {"type": "AdamW"}}, '"optimizer" is not taken here'),
        ({"scheduler": {"type": "WarmupLR"}}, '"scheduler" is not taken here'),
        ({"amp": {"enabled": True}}, '"amp" is not taken here'),
        ({"zero_optimization": {"stage": 1}}, "ZeRO stage 1"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer to cpu"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, '"zero_quantized_weights" is not taken'),
    ],
)
def test_what_contradicts_the_run_is_refused_by_name(tmp_path: Path, more: dict[str, Any], named: str) -> None:
    content = {"zero_optimization": {"stage": 2}} | more
    refused(f"--use_deepspeed --deepspeed_config_file {file_of(tmp_path, content)}", named)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--gradient_clipping 1.0", "--gradient_clipping 1.0, but --max-grad-norm 0.05"),
        ("--gradient_accumulation_steps 2", "--gradient_accumulation_steps 2"),
        ("--offload_optimizer_device cpu", "--offload_optimizer_device cpu"),
        ("--offload_param_device nvme", "--offload_param_device nvme"),
        ("--deepspeed_config_file absent.json", "absent.json: no such file"),
    ],
)
def test_flags_of_the_launcher_are_looked_at_too(more: str, named: str) -> None:
    refused(f"--use_deepspeed {more}", named)
    assert of("--use_deepspeed --gradient_clipping 0.05 --gradient_accumulation_steps 4").backend == "zero2"


@pytest.mark.parametrize("content", ["[1]", "{", '{"zero_optimization": 3}'])
def test_a_file_that_is_none(tmp_path: Path, content: str) -> None:
    refused(f"--use_deepspeed --deepspeed_config_file {file_of(tmp_path, content)}", "ds.json")


def test_what_is_the_same_may_be_written(tmp_path: Path) -> None:
    same = {
        "gradient_clipping": 0.05, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4,
        "train_batch_size": 16, "bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "zero_allow_untested_optimizer": False,
    }  # fmt: skip
    assert from_file("f", same, FLAGS, 2) == ({}, [])


def test_the_users_settings_lie_between_the_defaults_and_the_trainers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train_t2i.engine.zero._deepspeed", lambda device: None)
    more = {"steps_per_print": 7, "zero_optimization": {"reduce_bucket_size": 9, "overlap_comm": False}}

    def config(device: str, more: dict[str, Any]) -> dict[str, Any]:
        return ZeRO(torch.device(device), 3, 0.05, more)._config()

    plain, own = config("cuda", {}), config("cuda", more)
    assert (plain["steps_per_print"], own["steps_per_print"]) == (None, 7)
    assert (plain["gradient_clipping"], own["gradient_clipping"]) == (0.05, 0.05)
    assert plain["zero_optimization"]["overlap_comm"] is True
    assert own["zero_optimization"] == plain["zero_optimization"] | more["zero_optimization"]
    assert own["zero_optimization"]["stage"] == 3
    assert config("cpu", {"zero_optimization": {"overlap_comm": True}})["zero_optimization"]["overlap_comm"] is False
