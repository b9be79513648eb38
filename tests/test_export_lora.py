"""A run's LoRA, its merged weights and its pipeline in other programs: every family, in stock diffusers, ComfyUI and kohya's rules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import other_programs
import pytest
import stock
import tiny
import tiny_runs
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from flow_models import FAMILIES as FLOW
from flow_models import save_flow
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import refused
from torch import nn

from train_t2i.__main__ import main
from train_t2i.errors import UserError
from train_t2i.export.denoiser import merge_adapters
from train_t2i.export.kohya import Factors, kohya_state
from train_t2i.export.lora import check_alone
from train_t2i.families import load_family
from train_t2i.families.sdxl_file import UNET
from train_t2i.student import load_student

FAMILIES = ("sdxl", *FLOW)
FILE = "pytorch_lora_weights.safetensors"
FLAGS = {  # students of several steps, with a factor of 2 between alpha and rank
    "sdxl": "--sample-num-steps 2",
    "sd3": "--sample-num-steps 3 --sample-type ode --shift 3 --text-length 24 --resolution 64",
    "flux": "--sample-num-steps 2 --sample-type sde --shift 3 --text-length 24 --resolution 64",
    "qwen_image": "--sample-num-steps 2 --sample-type ode --shift 3 --text-length 24 --resolution 64",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, sdxl_folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {"sdxl": sdxl_folder, **{name: save_flow(root / name, name) for name in FLOW}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], prompts_file: Path) -> Callable[..., Path]:
    """A family's run of two steps, of a LoRA or of all weights, trained once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def trained(family: str, kind: str) -> Path:
        if (family, kind) not in made:
            lora = "--use-lora-gen --learning-rate-gen 1e-2" if kind == "lora" else ""
            flags = f"{FLAGS[family]} {lora}"
            made[family, kind] = tiny_runs.train(
                root, f"{family}-{kind}", flags, model=models[family], prompts=prompts_file
            )
        return made[family, kind]

    return trained


def export(run: Path, to: str, out: Path, *more: str) -> tuple[Path, dict[str, Any]]:
    """(the folder, its recommended call)."""
    assert main(["export", str(run), "--to", to, "--out", str(out), *more]) == 0
    return out, json.loads((out / "recommended.json").read_text())


def base_pipeline(base: Path, **parts: Any) -> Any:
    return DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, **parts)


def scheduled(pipe: Any, folder: Path) -> Any:
    """``pipe`` with the scheduler that was exported."""
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    pipe.scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    return pipe


def with_lora(base: Path, folder: Path) -> Any:
    pipe = base_pipeline(base)
    pipe.load_lora_weights(folder)
    return scheduled(pipe, folder)


def with_merged(base: Path, folder: Path) -> Any:
    (denoiser,) = (name for name in ("unet", "transformer") if (folder / name).is_dir())
    name = json.loads((folder / denoiser / "config.json").read_text())["_class_name"]
    net = getattr(diffusers, name).from_pretrained(folder, subfolder=denoiser)
    return scheduled(base_pipeline(base, **{denoiser: net}), folder)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


# -- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_makes_the_students_images_with_the_lora(
    family: str, run: Any, models: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    folder, call = export(run(family, "lora"), "lora", tmp_path / "lora")
    pipe, model = with_lora(models[family], folder), load_student(str(run(family, "lora")))
    print(family, "lora", stock.assert_same(pipe, model, monkeypatch, call))
    pipe.disable_lora()
    without = stock.images(pipe, model, monkeypatch, **call)
    ours = model.images(list(stock.PROMPTS), list(stock.SEEDS))
    assert (without - ours).abs().max() > 1e-2, "the LoRA does nothing"


def test_one_step_at_level_399(runs: dict[str, Path], sdxl_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder, call = export(runs["lora"], "lora", tmp_path / "lora")
    assert json.loads(header(folder / FILE)["distill.timesteps"]) == [399]
    print(
        "one step",
        stock.assert_same(with_lora(sdxl_folder, folder), load_student(str(runs["lora"])), monkeypatch, call),
    )


WHOLE = [(family, "full", to) for family in FLOW for to in ("pipeline", "merged")]


@pytest.mark.parametrize(("family", "kind", "to"), [*WHOLE, ("sdxl", "lora", "merged"), ("flux", "lora", "merged")])
def test_diffusers_makes_the_students_images_with_its_whole_weights(
    family: str, kind: str, to: str, run: Any, models: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    folder, call = export(run(family, kind), to, tmp_path / to)
    pipe = base_pipeline(folder) if to == "pipeline" else with_merged(models[family], folder)
    print(family, kind, to, stock.assert_same(pipe, load_student(str(run(family, kind))), monkeypatch, call))


# -- ComfyUI, kohya --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["lora", "kohya"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_programs_add_what_was_trained(family: str, to: str, run: Any, tmp_path: Path) -> None:
    folder, _ = export(run(family, "lora"), to, tmp_path / to)
    model = load_student(str(run(family, "lora")))
    base = model.family.load(torch.float32)
    places = other_programs.publisher(family, base)
    plain = other_programs.weights(base, places)
    merged = other_programs.weights(merge_adapters(model.network), places)
    found = other_programs.applied(plain, places, load_file(folder / FILE))
    moved = max(float((merged[name] - plain[name]).abs().max()) for name in plain)
    apart = max(float((merged[name] - found[name]).abs().max()) for name in plain)
    print(family, to, "moved", moved, "apart", apart)
    assert moved > 1e-3
    assert apart < 1e-6
    alphas = {key: float(tensor) for key, tensor in load_file(folder / FILE).items() if key.endswith(".alpha")}
    assert bool(alphas) == (to == "kohya" or family == "sdxl")


def test_diffusers_reads_kohyas_names(run: Any, tmp_path: Path) -> None:
    """Of Qwen-Image at any width; of FLUX.1 at the published one, which its reader takes for granted.  SD3's it does not know."""
    (lora, _), (kohya, _) = (export(run("qwen_image", "lora"), to, tmp_path / to) for to in ("lora", "kohya"))
    read = diffusers.QwenImagePipeline.lora_state_dict(kohya)
    assert tiny_runs.equal(read, load_file(lora / FILE))

    width, rank = 3072, 2
    with torch.device("meta"):
        net = diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32
        )
    names = [
        name for name, layer in net.named_modules() if isinstance(layer, nn.Linear) and "transformer_blocks" in name
    ]
    factors = {
        name: Factors(torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank))
        for name in names
        for layer in [net.get_submodule(name)]
    }
    assert len(factors) == 20
    assert factors["single_transformer_blocks.0.proj_out"].down.shape == (rank, 5 * width)
    state, _ = diffusers.FluxPipeline.lora_state_dict(kohya_state("flux", net, factors), return_alphas=True)
    expected = {
        f"transformer.{name}.lora_{x}.weight": t for name, f in factors.items() for x, t in (("A", f.down), ("B", f.up))
    }
    assert tiny_runs.equal(state, expected)


def test_diffusers_knows_every_layer_of_sdxl_by_the_name_that_kohya_gives_it() -> None:
    """The published architecture, all that can have a LoRA."""
    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel.from_config(UNET)
    names = {name for name, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    state = kohya_state("sdxl", net, {name: Factors(torch.ones(1, 1), torch.ones(1, 1)) for name in names})
    assert {
        f"lora_unet_{name}.alpha" for name in ("input_blocks_4_1_proj_in", "output_blocks_5_2_conv", "out_2")
    } < set(state)
    read, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(state, unet_config=net.config)
    found = {
        key.removeprefix("unet.").split(".lora_A")[0]
        for key in convert_unet_state_dict_to_peft(read)
        if ".lora_A" in key
    }
    assert found == names
    assert len(alphas) == len(names) > 700


def test_a_part_without_a_lora_adds_nothing(models: dict[str, Path]) -> None:
    """SD3's last block has no LoRA of the text's queries; here one of keys alone."""
    net = load_family("sd3", str(models["sd3"])).load(torch.float32)
    name = "transformer_blocks.0.attn.to_k"
    factors = Factors(torch.randn(2, 32), torch.randn(32, 2))
    state = kohya_state("sd3", net, {name: factors})
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert state.keys() == {f"{key}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    added = state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"]
    expected = torch.zeros(96, 32)
    expected[32:64] = factors.up @ factors.down
    assert torch.equal(added, expected)
    assert state[f"{key}.alpha"] == 2


@pytest.mark.parametrize(
    ("family", "name"), [("sdxl", "nothing.to_q"), ("flux", "x_embedder"), ("sd3", "transformer_blocks.0.norm1.linear")]
)
def test_a_layer_without_a_name_is_told(family: str, name: str, models: dict[str, Path]) -> None:
    net = load_family(family, str(models[family])).load(torch.float32)
    with pytest.raises(UserError, match=f"{name}: kohya's trainers have no name"):
        kohya_state(family, net, {name: Factors(torch.ones(1, 1), torch.ones(1, 1))})


# -- headers ---------------------------------------------------------------------------------------------------------


def test_a_header_says_how_the_file_is_sampled(run: Any, models: dict[str, Path], tmp_path: Path) -> None:
    folder, call = export(run("sd3", "lora"), "lora", tmp_path / "lora")
    said = header(folder / FILE)
    assert said["distill.steps"] == "3"
    sigmas = [3 * u / (1 + 2 * u) for u in (1, 2 / 3, 1 / 3, 0)]  # shift 3
    assert json.loads(said["distill.sigmas"]) == pytest.approx(sigmas, abs=1e-6)
    assert json.loads(said["distill.timesteps"]) == pytest.approx([1000 * sigma for sigma in sigmas[:-1]], abs=1e-3)
    assert json.loads(said["distill.guidance"]) == {"guidance_scale": 0.0}
    assert json.loads(said["distill.scheduler"]) == json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert said["distill.base_model"] == models["sd3"].name
    assert str(models["sd3"].parent) not in json.dumps(said)
    assert said["modelspec.title"] == "sd3, 3 steps"
    assert all(f"{name}={value}" in said["modelspec.usage_hint"] for name, value in call.items())
    settings = json.loads(said["lora_adapter_metadata"])
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 4
    assert said["modelspec.hash_sha256"] == digest(folder / FILE)


def test_sigmas_of_sdxl_are_those_of_samplers_of_sigmas(run: Any, tmp_path: Path) -> None:
    """Against diffusers' Euler sampler, which is one."""
    folder, _ = export(run("sdxl", "lora"), "kohya", tmp_path / "kohya")
    said = header(folder / FILE)
    assert json.loads(said["distill.timesteps"]) == [999, 499]
    euler = diffusers.EulerDiscreteScheduler(**tiny.NOISE, timestep_spacing="trailing")
    euler.set_timesteps(2)
    torch.testing.assert_close(torch.tensor(json.loads(said["distill.sigmas"])), euler.sigmas, rtol=1e-5, atol=0)
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "4", "4")


def digest(file: Path) -> str:
    """Of the bytes behind the header."""
    data = file.read_bytes()
    return "0x" + hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_every_shard_has_a_header_and_the_same_weights_make_the_same_files(run: Any, tmp_path: Path) -> None:
    first, second = (export(run("flux", "lora"), "merged", tmp_path / x, "--max-shard-size", "60KB")[0] for x in "ab")
    files = sorted((first / "transformer").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        said = header(file)
        assert said["format"] == "pt"
        assert said["distill.steps"] == "2"
        assert json.loads(said["distill.guidance"])["guidance_scale"] == 3.5
        assert said["modelspec.hash_sha256"] == digest(file)
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    for file in first.rglob("*"):
        assert file.is_dir() or file.read_bytes() == (second / file.relative_to(first)).read_bytes()


def test_half_precision(run: Any, models: dict[str, Path], tmp_path: Path) -> None:
    (whole, _), (half, _) = (export(run("sd3", "lora"), "lora", tmp_path / x, "--dtype", x) for x in ("fp32", "bf16"))
    full, state = load_file(whole / FILE), load_file(half / FILE)
    assert all(torch.equal(state[key], tensor.bfloat16()) for key, tensor in full.items())


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_what_has_no_lora_is_told(
    run: Any, tmp_path: Path, models: dict[str, Path], prompts_file: Path, capsys: Any
) -> None:
    full, out = run("sd3", "full"), tmp_path / "out"
    for to in ("lora", "kohya"):
        assert "this run trained its generator's own weights" in refused(
            capsys, "export", full, "--to", to, "--out", out
        )
    start = tiny_runs.record(full, 2)
    flags = f"{FLAGS['sd3']} --use-lora-gen --generator-init {start} --max-train-steps 1 --sample-steps 0"
    upon = tiny_runs.train(tmp_path, "upon", flags, model=models["sd3"], prompts=prompts_file)
    assert f"this run's LoRA lies on {start}" in refused(capsys, "export", upon, "--to", "lora", "--out", out)
    run_settings = replace(load_student(str(run("sd3", "lora"))).settings.run, method="arcflow")
    with pytest.raises(UserError, match="has layers of its own"):
        check_alone(run_settings)
    assert "--max-shard-size does nothing" in refused(
        capsys, "export", full, "--to", "lora", "--out", out, "--max-shard-size", "1GB"
    )
    assert not out.exists()


@pytest.mark.parametrize("wrong", ["nothing", "another factor"])
def test_a_file_that_diffusers_reads_otherwise_does_not_get_its_name(
    wrong: str, run: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    kind = diffusers.StableDiffusion3Pipeline
    load = kind.load_lora_weights

    def misread(pipe: Any, *given: Any, adapter_name: str) -> None:
        if wrong == "nothing":
            return
        load(pipe, *given, adapter_name=adapter_name)
        layer = pipe.transformer.transformer_blocks[0].attn.to_q
        layer.scaling[adapter_name] *= 2

    monkeypatch.setattr(kind, "load_lora_weights", misread)
    said = refused(capsys, "export", run("sd3", "lora"), "--to", "lora", "--out", tmp_path / "out")
    assert f"stock diffusers loads {0 if wrong == 'nothing' else 13} of the 14 layers" in said
    assert not list(tmp_path.iterdir())
