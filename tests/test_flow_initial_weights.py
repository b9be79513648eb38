"""What an SD3, FLUX.1 or Qwen-Image generator starts from, against diffusers' own loading and fusing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from diffusers.training_utils import _collate_lora_metadata
from flow_models import FAMILIES, load_pipeline, save_flow
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from train_t2i.adapters import AdapterSpec, export_adapter
from train_t2i.errors import UserError
from train_t2i.families import load_family
from train_t2i.initial_weights import load_generator_weights

RANK = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {name: save_flow(root / name, name) for name in FAMILIES}


def lora_of(folder: Path, name: str, alpha: int) -> tuple[Any, dict[str, Tensor]]:
    """(a network with a LoRA that does something, its factors in peft's names)."""
    net = load_pipeline(folder, name).transformer
    net.add_adapter(LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["to_q", "to_out.0", "add_k_proj"]))
    tiny.shake(net, "lora_", size=0.1)
    return net, get_peft_model_state_dict(net)


def assert_fused_as_diffusers_does(name: str, folder: Path, source: Path, file: str | None = None) -> None:
    """``source`` in our generator equals it in the stock pipeline, and is not the teacher."""
    pipe, family = load_pipeline(folder, name), load_family(name, str(folder))
    pipe.load_lora_weights(source, weight_name=file)
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    net = family.load(torch.float32)
    plain = {key: value.clone() for key, value in net.state_dict().items()}
    load_generator_weights(family, net, str(source / file if file else source), "")
    assert tiny_runs.equal(dict(net.state_dict()), dict(pipe.transformer.state_dict()))
    moved = [key for key, value in net.state_dict().items() if not torch.equal(value, plain[key])]
    assert {key.split(".")[-2] for key in moved} == {"to_q", "0", "add_k_proj"}


@pytest.mark.parametrize("alpha", [RANK, 3 * RANK])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_that_diffusers_saved(name: str, alpha: int, folders: dict[str, Path], tmp_path: Path) -> None:
    """An alpha that is not the rank stands in the file's header alone."""
    net, lora = lora_of(folders[name], name, alpha)
    kind = type(load_family(name, str(folders[name]), encoders=False)).Pipeline
    settings = _collate_lora_metadata({"transformer": net}) if alpha != RANK else {}
    kind.save_lora_weights(tmp_path, transformer_lora_layers=lora, **settings)
    assert_fused_as_diffusers_does(name, folders[name], tmp_path)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_a_lora_in_another_trainers_names(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Alphas beside the factors: those of FLUX.1's come back from its converter apart."""
    _, lora = lora_of(folders[name], name, RANK)
    before = "transformer." if name == "flux" else "diffusion_model."
    named = {before + key: value.contiguous() for key, value in lora.items()}
    stems = {key.split(".lora_")[0] for key in named}
    save_file({**named, **{f"{stem}.alpha": torch.tensor(3.0 * RANK) for stem in stems}}, tmp_path / "lora.safetensors")
    assert_fused_as_diffusers_does(name, folders[name], tmp_path, "lora.safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lora_of_a_run(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, spec = load_family(name, str(folders[name])), AdapterSpec(2 * RANK, 4 * RANK)
    nets = tiny.networks(family, "shared", rank=RANK)
    tiny.shake(nets.modules["base"])
    weights = {key: p.detach().clone() for key, p in nets.named_parameters("generator").items()}
    files, config = export_adapter(nets.family, "generator", spec, weights)
    save_file(files["adapter_model"], tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    net = family.load(torch.float32)
    plain = {key: value.clone() for key, value in net.state_dict().items()}
    load_generator_weights(family, net, str(tmp_path), "")
    for key, value in net.state_dict().items():
        expected, stem = plain[key], key.removesuffix(".weight")
        if (down := weights.get(f"{stem}.lora_A.generator.weight")) is not None:
            expected = expected + 2 * weights[f"{stem}.lora_B.generator.weight"] @ down
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=key)


def test_a_lora_of_another_family_is_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    family = load_family("sd3", str(folders["sd3"]))
    save_file({f"unet.down.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"lora\.safetensors: this LoRA changes nothing"):
        load_generator_weights(family, family.load(torch.float32), str(tmp_path / "lora.safetensors"), "")


def test_a_pipeline_folder(folders: dict[str, Path], prompts_file: Path, tmp_path: Path) -> None:
    source = save_flow(tmp_path / "other", "sd3", seed=1)
    flags = f"--generator-init {source} --learning-rate-gen 0 --max-train-steps 1 --text-length 24"
    run = tiny_runs.train(tmp_path, "run", flags, model=folders["sd3"], prompts=prompts_file)
    (file,) = (source / "transformer").glob("*.safetensors")
    state = {key: value.float() for key, value in load_file(file).items()}
    found = tiny_runs.weights(run, 1)
    assert tiny_runs.equal({key: state[key] for key in found}, found)


def test_the_generator_of_a_run_keeps_the_buffers_of_the_model(
    folders: dict[str, Path], prompts_file: Path, tmp_path: Path
) -> None:
    """SD3's table of positions is a buffer, which no checkpoint has."""
    flags = "--learning-rate-gen 1e-3 --max-train-steps 1 --cold-start-iter 1 --text-length 24"
    run = tiny_runs.train(tmp_path, "run", flags, model=folders["sd3"], prompts=prompts_file)
    family = load_family("sd3", str(folders["sd3"]))
    net = family.load(torch.float32)
    buffers = {name: tensor.clone() for name, tensor in net.named_buffers()}
    load_generator_weights(family, net, str(tiny_runs.record(run, 1)), "accelerator_1")
    assert buffers.keys() >= {"pos_embed.pos_embed"}
    assert tiny_runs.equal(buffers, dict(net.named_buffers()))
    assert tiny_runs.equal(dict(net.named_parameters()), tiny_runs.weights(run, 1))
