"""A small random tower of each reward, as a folder that open_clip itself can load."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

SIZE_PX = 32
MODES = {"clip": "squash", "hpsv2": "longest"}
PROMPTS = ["a red circle", "two small blue squares on a yellow ground", "", "a red circle", "naïve café ☕"]
CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIZE_PX, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {},
}


def write_folder(folder: Path, name: str, state: dict[str, torch.Tensor] | None = None) -> Path:
    """A random small tower of the reward ``name``, as a folder that open_clip itself can load."""
    config = json.loads(json.dumps(CONFIG))
    config["model_cfg"]["quick_gelu"] = name == "clip"
    config["preprocess_cfg"]["resize_mode"] = MODES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if state is None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            state = open_clip.CLIP(**config["model_cfg"]).state_dict()
            for tensor in state.values():  # away from the initial ones, zeros and tiny weights
                tensor += 0.1 * torch.randn_like(tensor)
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def random_images(batch: int, height_px: int, width_px: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(
        batch, 3, height_px, width_px, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).to(dtype)
