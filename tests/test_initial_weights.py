"""What a generator starts from: weights, a LoRA, another run's LoRA; what does not fit is one line."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_runs import equal, weights

from train_t2i.errors import EXIT_USER
from train_t2i.families import load_family


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
