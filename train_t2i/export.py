"""``python -m train_t2i export RUN --to pipeline``: a run's generator as a folder that stock diffusers loads.

The folder holds everything: the generator with its LoRA merged in fp32, text encoders, tokenizers, VAE, and a scheduler
whose config alone makes ``DiffusionPipeline.from_pretrained(DIR)(prompt, num_inference_steps=N, ...)`` visit the
student's own times.  ``recommended.json`` has the call: N, guidance, size, text length; ``README.md`` is the hub's card.
The denoiser is read back and compared bit by bit before the folder gets its name.  ``--push ORG/NAME`` uploads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_t2i.choice import RunChoice
from train_t2i.cli import parse_verb
from train_t2i.config import EDIT_FAMILIES, flag
from train_t2i.errors import EXIT_DISK, EXIT_DONE, UserError
from train_t2i.evaluation.table import read_given_table
from train_t2i.inference import many_step_scheduler, student_scheduler
from train_t2i.push import check_push, upload

if TYPE_CHECKING:
    from torch import nn

    from train_t2i.card import Card
    from train_t2i.student import ImageModel

FORMATS = ("pipeline",)
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # as torch calls them
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(KB|MB|GB|TB)", re.IGNORECASE)


@dataclass(frozen=True)
class ExportConfig(RunChoice):
    """Write a run's generator as a diffusers pipeline folder."""

    to: str = flag("pipeline", "what to write: pipeline (the folder of the model's own diffusers pipeline)")
    out: str | None = flag(None, "folder to write (default: RUN/pipeline/step-N)")
    pretrained_model: str | None = flag(None, "where the run's base model lies now, if it has moved")
    vae: str | None = flag(None, "VAE to use instead of the run's")
    dtype: str = flag("fp32", "number format of the saved weights", choices=("fp32", "fp16", "bf16"))
    max_shard_size: str = flag("10GB", "most bytes of a weights file: a number and KB, MB, GB or TB")
    table: str | None = flag(None, "evaluation table to show in the card (JSON of the verb evaluate)")
    push: str | None = flag(None, "repository of the hub, ORG/NAME, to upload the folder to; private")
    push_public: bool = flag(False, "with --push: a public repository")
    dry_run: bool = flag(False, "with --push: write the folder and list what would be uploaded")


def merge_adapters(net: nn.Module) -> nn.Module:
    """Fold every LoRA into the layer it sits on, in the layer's own (fp32) format, and put the plain layer back."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(net.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True, adapter_names=list(layer.lora_A) or None)
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, layer.get_base_layer())
    return net


def own_layers(net: Any, adapter: str) -> None:
    """Put an ArcFlow generator's own layers into the network, which stays one that stock diffusers loads: of more channels."""
    from train_t2i.adapters import Replaced

    norm, head = net.norm_out, net.proj_out
    assert isinstance(norm, Replaced)
    assert isinstance(head, Replaced)
    own: Any = head.own[adapter]
    net.norm_out, net.proj_out = norm.own[adapter], own.as_linear()
    net.register_to_config(out_channels=net.proj_out.out_features // net.config.patch_size**2)


def check_policy(model: ImageModel) -> None:
    if model.settings.method.policy != "momentum":
        raise UserError(
            f"--policy {model.settings.method.policy} has no pipeline: its steps are more than one sum",
            "sample with python -m train_t2i sample",
        )


def pipeline_file(pipeline: type) -> str:
    """The code that an ArcFlow student's folder is sampled with, for the model's own pipeline class."""
    source = Path(__file__).with_name("policy_pipeline.py").read_text(encoding="utf-8")
    return source.replace("FluxPipeline", pipeline.__name__)


def build_pipeline(model: ImageModel) -> tuple[Any, dict[str, Any]]:
    """(the pipeline, its recommended call)."""
    run, family = model.settings.run, model.family
    supervised = run.method == "sft"
    if run.method == "arcflow":
        check_policy(model)
        own_layers(model.network, "generator")
    scheduler = many_step_scheduler(model) if supervised else student_scheduler(model)
    pipe = family.pipeline(merge_adapters(model.network), scheduler, model.latent_shape[1:])
    height_px, width_px = model.settings.size_px
    recommended = {
        "num_inference_steps": run.teacher_num_steps if supervised else run.sample_num_steps,
        **family.call_options(run.teacher_cfg if supervised else 0.0),
        "height": height_px,
        "width": width_px,
    }
    return pipe, recommended


def written_wrong(net: nn.Module, folder: Path) -> list[str]:
    """Names of what the weights files of ``folder`` have otherwise than ``net``, bit for bit, or in another file than their
    index says; a file that cannot be read is named itself.  Each is read once, a tensor at a time."""
    import torch
    from safetensors import SafetensorError, safe_open

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    expected, index = net.state_dict(), folder / f"{WEIGHTS}.index.json"
    places: dict[str, str] = dict.fromkeys(expected, WEIGHTS)
    if index.exists():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    wrong = sorted(places.keys() ^ expected.keys())
    for name in sorted(set(places.values())):
        listed = {key for key, place in places.items() if place == name}
        try:
            with safe_open(folder / name, framework="pt") as file:
                held = set(file.keys())
                wrong += sorted(held ^ listed)
                for key in sorted(held & listed & expected.keys()):
                    tensor, ours = file.get_tensor(key), expected[key]
                    alike = (tensor.shape, tensor.dtype) == (ours.shape, ours.dtype)
                    if not alike or not torch.equal(bits(tensor), bits(ours)):
                        wrong.append(key)
        except SafetensorError:
            wrong.append(name)
    return wrong


def write_folder(
    pipe: Any,
    recommended: dict[str, Any],
    out: Path,
    code: str = "",
    card: Card | None = None,
    *,
    denoiser: str,
    max_shard_size: str,
) -> None:
    """The folder, complete or absent, with the weights of the part ``denoiser`` read back; with the ``code`` that it is
    sampled with, where that is not diffusers' own, and a ``card`` where it has one."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pipe.save_pretrained(temporary, max_shard_size=max_shard_size)
        if wrong := written_wrong(getattr(pipe, denoiser), temporary / denoiser):
            raise UserError(
                f"--out {out}: {len(wrong)} tensors were not written as they are, first {wrong[0]}",
                "is the disk sound? export to another",
                EXIT_DISK,
            )
        text = json.dumps(recommended, indent=1) + "\n"
        (temporary / "recommended.json").write_text(text, encoding="utf-8")
        if card:
            card.write(temporary)
        if code:
            (temporary / "pipeline.py").write_text(code, encoding="utf-8")
        os.rename(temporary, out)  # noqa: PTH104 - refuses a folder that came meanwhile and has something in it
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror or error})", "make room, or choose another", EXIT_DISK
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: is already there", "choose another folder, or remove it")


def check_size(text: str) -> None:
    match = SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--max-shard-size {text}: not a size", "e.g. 10GB")


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(ExportConfig, "export", arguments)
    check_size(config.max_shard_size)
    if config.to not in FORMATS:
        raise UserError(f"--to {config.to}: not available", f"available: {', '.join(FORMATS)}")
    if len(config.runs) != 1:
        raise UserError(f"{len(config.runs)} runs are given", "give the one run to export, OUTPUT_DIR/EXP_NAME")
    if config.out:
        refuse_existing(Path(config.out))
    rows = read_given_table(config.table) if config.table else []
    check_push(config.push, public=config.push_public, dry_run=config.dry_run)
    import torch

    from train_t2i.card import Card
    from train_t2i.student import load_student

    model = load_student(
        config.runs[0], config.step, pretrained_model=config.pretrained_model, vae=config.vae,
        device=torch.device("cpu"),
    )  # fmt: skip
    out = Path(config.out) if config.out else Path(str(model.run)) / "pipeline" / f"step-{model.step}"
    refuse_existing(out)
    pipe, recommended = build_pipeline(model)
    if config.dtype != "fp32":
        pipe.to(getattr(torch, DTYPES[config.dtype]))
    needs_code = model.settings.run.method == "arcflow"
    code = pipeline_file(type(pipe)) if needs_code else ""
    card = Card(config.push or out.name, model, recommended, DTYPES[config.dtype], needs_code, rows)
    write_folder(
        pipe, recommended, out, code, card, denoiser=model.family.denoiser_name, max_shard_size=config.max_shard_size
    )
    call = ", ".join(f"{name}={value!r}" for name, value in recommended.items())
    print(f"{out}: pipe(prompt, {call})")
    if model.settings.run.model_family in EDIT_FAMILIES:
        print("its text encoder must be told which tokens are an image's: docs/supervised.md has the three lines")
    if needs_code:
        print(f"it is sampled with {out}/pipeline.py: docs/methods.md says how to load it")
    if config.push:
        print(upload(out, config.push, public=config.push_public, dry_run=config.dry_run))
    return EXIT_DONE
