"""The stages of the tiny SD3, FLUX.1 and Qwen-Image.

SD3 and FLUX.1 share an autoencoder and T5; their CLIP encoders are those of the tiny SDXL.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from transformers import CLIPTextModel, CLIPTextModelWithProjection, Qwen2_5_VLForConditionalGeneration, T5EncoderModel

from shapes import autoencoder as ae
from shapes import finetune, measure
from shapes import qwen_autoencoder as qa
from shapes.flow_models import PIPELINES, TEXT_LENGTH, TRANSFORMERS, FlowRecipe, assemble, new_transformer
from shapes.guidance import UNGUIDED, GuidanceRecipe, distil_guidance
from shapes.long_text_encoders import QwenTextRecipe, T5Recipe, train_qwen_text, train_t5, with_projection
from shapes.oracle import adherence
from shapes.scenes import unique_captions
from shapes.stage import SEED, Paths, Stage, judged, world

WIDE = ae.WideAutoencoderRecipe()
QWEN_AUTOENCODER = qa.QwenAutoencoderRecipe()
RECOLOURED = qa.RecolouredRecipe()
T5 = T5Recipe()
QWEN_TEXT = QwenTextRecipe()
SD3 = FlowRecipe("sd3", seed=51, width=92, heads=4, layers=4, legs=(10000,))
FLUX = FlowRecipe("flux", seed=51, width=128, heads=4, layers=1, single_layers=3, legs=(4000, 7000))
QWEN = FlowRecipe("qwen_image", seed=53, width=104, heads=4, layers=4, legs=(12000, 20000, 28000), pictures=24576)
GUIDANCE = GuidanceRecipe()
CFGS = (1.5, 2.0, 3.0)
PROMPTS, STEPS, BATCH = 500, 25, 100


def make_wide_autoencoder(paths: Paths, run_name: str) -> dict[str, float]:
    vae = ae.train_wide_autoencoder(measure.load_vae(paths.sdxl / "vae"), world(paths), WIDE)
    ae.save(vae, part(paths, "wide-autoencoder"))
    return measure.autoencoder(part(paths, "wide-autoencoder"), judged(paths))


def make_qwen_autoencoder(paths: Paths, run_name: str) -> dict[str, float]:
    data = world(paths)
    vae = qa.train_qwen_autoencoder(data, QWEN_AUTOENCODER)
    vae = qa.train_recoloured(vae, qa.beside_twins(data, "train", SEED), RECOLOURED)
    vae.half().save_pretrained(part(paths, "qwen-autoencoder"))
    return qa.measure(part(paths, "qwen-autoencoder"), judged(paths))


def make_t5(paths: Paths, run_name: str) -> dict[str, float]:
    encoder, quality = train_t5(world(paths), T5)
    encoder.half().save_pretrained(part(paths, "t5"))
    return quality


def make_qwen_text(paths: Paths, run_name: str) -> dict[str, float]:
    encoder, quality = train_qwen_text(world(paths), QWEN_TEXT)
    encoder.half().save_pretrained(part(paths, "qwen-text"))
    return quality


def part(paths: Paths, name: str) -> Path:
    """Where a part waits for the pipeline folders that will hold it."""
    return paths.work / "parts" / name


def undistilled(paths: Paths) -> Path:
    """FLUX.1's transformer before its guidance is distilled: the committed one is overwritten then."""
    return part(paths, "flux-undistilled")


HOLDERS = {  # part -> the committed folder that holds it
    "wide-autoencoder": ("flux", "vae"),
    "t5": ("flux", "text_encoder_2"),
    "qwen-autoencoder": ("qwen_image", "vae"),
    "qwen-text": ("qwen_image", "text_encoder"),
    "qwen-edit-text": ("qwen_image_edit", "text_encoder"),
}


def holder(paths: Paths, name: str) -> Path:
    family, folder = HOLDERS[name]
    return paths.flow(family) / folder


def found(kind: Any, paths: Paths, name: str) -> Any:
    """A part made in this work folder, or the committed one."""
    fresh = part(paths, name)
    return loaded(kind, fresh if fresh.exists() else holder(paths, name))


def loaded(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)


def new_parts(recipe: FlowRecipe, paths: Paths) -> dict[str, Any]:
    """A pipeline's models: the encoders and autoencoders of the stages before, and an untrained transformer."""
    torch.manual_seed(recipe.seed + 1)
    if recipe.family == "qwen_image":
        return {
            "vae": found(AutoencoderKLQwenImage, paths, "qwen-autoencoder"),
            "text_encoder": found(Qwen2_5_VLForConditionalGeneration, paths, "qwen-text"),
            "transformer": new_transformer(recipe, QWEN_TEXT.width, 0),
        }
    first = loaded(CLIPTextModel, paths.sdxl / "text_encoder")
    vae, t5 = found(AutoencoderKL, paths, "wide-autoencoder"), found(T5EncoderModel, paths, "t5")
    if recipe.family == "flux":
        transformer = new_transformer(recipe, T5.width, first.config.hidden_size)
        return {"vae": vae, "text_encoder": first, "text_encoder_2": t5, "transformer": transformer}
    second = loaded(CLIPTextModelWithProjection, paths.sdxl / "text_encoder_2")
    pooled = first.config.hidden_size + second.config.hidden_size
    return {
        "vae": vae, "text_encoder": with_projection(first), "text_encoder_2": second, "text_encoder_3": t5,
        "transformer": new_transformer(recipe, T5.width, pooled),
    }  # fmt: skip


def make_pipeline(recipe: FlowRecipe, paths: Paths, run_name: str) -> dict[str, float]:
    """The pipeline folder, its transformer trained by the trainer itself."""
    folder = paths.flow(recipe.family)
    assemble(recipe.family, new_parts(recipe, paths), folder)
    told: dict[str, object] = {} if recipe.family == "qwen_image" else {"text-length": TEXT_LENGTH}
    if recipe.family == "flux":
        told["guidance-embed"] = UNGUIDED
    trained = finetune.supervised(
        folder, paths.work, recipe, run_name, pictures_seed=recipe.pictures_seed, more=told, legs=recipe.legs, threads=1
    )
    finetune.install(trained, folder / "transformer", TRANSFORMERS[recipe.family])
    if recipe.family == "flux":
        shutil.copytree(folder / "transformer", undistilled(paths), dirs_exist_ok=True)
        return {}
    return teacher_adherence(recipe.family, folder)


def make_guidance(paths: Paths, run_name: str) -> dict[str, float]:
    distil_guidance(undistilled(paths), paths.flow("flux"), world(paths), GUIDANCE, TEXT_LENGTH)
    return teacher_adherence("flux", paths.flow("flux"))


@torch.no_grad()
def teacher_adherence(family: str, folder: Path) -> dict[str, float]:
    """Oracle adherence of the stock pipeline on held-out prompts at each guidance."""
    pipeline = PIPELINES[family].from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = unique_captions("heldout", 0, PROMPTS)
    scores = {}
    for cfg in CFGS:
        told: dict[str, Any] = {"guidance_scale": cfg, "max_sequence_length": TEXT_LENGTH}
        if family == "qwen_image":
            told = {"true_cfg_scale": cfg}
        made = []
        for first in range(0, PROMPTS, BATCH):
            batch = prompts[first : first + BATCH]
            seed = torch.Generator().manual_seed(first)
            negative = {"negative_prompt": [""] * len(batch)} if family == "qwen_image" else {}
            images = pipeline(
                batch,
                height=64,
                width=64,
                num_inference_steps=STEPS,
                generator=seed,
                output_type="pt",
                **told,
                **negative,
            ).images
            made.append(images.float().clamp(0, 1))
        scores[f"adherence, {STEPS} steps, guidance {cfg:g}"] = float(adherence(torch.cat(made), prompts).mean())
    return scores


def pipeline_stage(name: str, recipe: FlowRecipe, needs: tuple[str, ...]) -> Stage:
    output = functools.partial(_transformer_of, family=recipe.family)
    return Stage(name, recipe, needs, output, functools.partial(make_pipeline, recipe))


def _transformer_of(paths: Paths, family: str) -> Path:
    return paths.flow(family) / "transformer"


# Parts lie in `work` and may be gone; they count as present as long as a pipeline folder holds them.
STAGES = (
    Stage("wide-autoencoder", WIDE, ("autoencoder",), lambda p: holder(p, "wide-autoencoder"), make_wide_autoencoder),
    Stage("t5", T5, (), lambda p: holder(p, "t5"), make_t5),
    Stage(
        "qwen-autoencoder",
        (QWEN_AUTOENCODER, RECOLOURED),
        (),
        functools.partial(holder, name="qwen-autoencoder"),
        make_qwen_autoencoder,
    ),
    Stage("qwen-text", QWEN_TEXT, (), lambda p: holder(p, "qwen-text"), make_qwen_text),
    pipeline_stage("sd3", SD3, ("wide-autoencoder", "t5", "text")),
    pipeline_stage("flux", FLUX, ("wide-autoencoder", "t5", "text")),
    Stage("flux-guidance", GUIDANCE, ("flux",), functools.partial(_transformer_of, family="flux"), make_guidance),
    pipeline_stage("qwen-image", QWEN, ("qwen-autoencoder", "qwen-text")),
)
