"""How an exported folder is used: what a card says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train_t2i.config import EDIT_FAMILIES

if TYPE_CHECKING:
    from train_t2i.export.recipe import Recipe

EDIT_NOTE = (
    "Under transformers 5 the text encoder must also be told which tokens are an image's: train_t2i's docs/supervised.md "
    "has the lines."
)
CODE_NOTE = "`trust_remote_code` lets `pipeline.py` of this repository run: read it first, it is sixty lines."


@dataclass(frozen=True)
class Usage:
    """``title`` is where the folder is found, ``to`` what was written, ``base`` the base model's repository, if it has one."""

    title: str
    to: str
    family: str
    recipe: Recipe
    dtype: str
    base: str | None
    own_code: bool = False  # the folder is sampled with its pipeline.py

    @property
    def in_diffusers(self) -> bool:
        """Diffusers reads kohya's names of all families but SD3."""
        return not (self.to == "kohya" and self.family == "sd3")

    def text(self) -> str:
        """Code that runs as it stands, but for the prompt (and the image that is edited), and what other programs are told."""
        code = f"```python\n{self.code()}\n```\n\n" if self.in_diffusers else ""
        return f"## How to use it\n\n{code}{' '.join(self.notes())}"

    def code(self) -> str:
        edits = self.family in EDIT_FAMILIES
        options = ", ".join(f"{name}={value!r}" for name, value in self.recipe.call.items())
        asked = 'image=[load_image("picture.png")], prompt="make the sky pink"' if edits else '"a lighthouse at dusk"'
        names = ["DiffusionPipeline"] if self.to == "pipeline" else ["DiffusionPipeline", self.scheduler]
        lines = ["import torch", f"from diffusers import {', '.join(names)}"]
        lines += ["from diffusers.utils import load_image"] if edits else []
        lines += ["", *self.loading(), 'pipe.to("cuda" if torch.cuda.is_available() else "cpu")']
        return "\n".join([*lines, f"image = pipe({asked}, {options}).images[0]"])

    @property
    def scheduler(self) -> str:
        return type(self.recipe.scheduler).__name__

    def loading(self) -> list[str]:
        dtype = f"torch_dtype=torch.{self.dtype}"
        if self.to == "pipeline":
            own = f', custom_pipeline="{self.title}", trust_remote_code=True' if self.own_code else ""
            return [f'pipe = DiffusionPipeline.from_pretrained("{self.title}", {dtype}{own})']
        base = self.base or self.recipe.header["distill.base_model"]
        return [
            f'pipe = DiffusionPipeline.from_pretrained("{base}", {dtype})',
            f'pipe.load_lora_weights("{self.title}")',
            f'pipe.scheduler = {self.scheduler}.from_pretrained("{self.title}", subfolder="scheduler")',
        ]

    def notes(self) -> list[str]:
        notes = [
            "The scheduler of this repository visits the times that the student was trained on; another one does not."
        ]
        notes += ["`recommended.json` holds the same call for programs."]
        if self.to != "pipeline":
            notes += ["\n\nIts strength is 1 in every program: alpha is the rank.", self.other_programs()]
        notes += [f"\n\n{CODE_NOTE}"] if self.own_code else []
        return [*notes, f"\n\n{EDIT_NOTE}"] if self.family in EDIT_FAMILIES else notes

    def other_programs(self) -> str:
        """docs/export.md says which sampler of ComfyUI does what."""
        call = self.recipe.call
        if self.family == "sdxl" and call["num_inference_steps"] == 1:
            return "Not for ComfyUI: it scales the noise to the first sigma, and this student takes noise of unit variance."
        told = call.get("true_cfg_scale", call.get("guidance_scale", 1))
        guidance = f"CFG 1, guidance {told:g}" if self.family == "flux" else f"CFG {max(1, told):g}"
        renoises = self.scheduler == "LCMScheduler" or self.recipe.scheduler.config.get("stochastic_sampling")
        sigmas = ", ".join(f"{sigma:.6g}" for sigma in json.loads(self.recipe.header["distill.sigmas"]))
        return f"In ComfyUI: {guidance}, sampler `{'lcm' if renoises else 'euler'}`, `ManualSigmas` {sigmas}."
