"""``python -m train_t2i pairs``: the teacher's results for (prompt, seed), the data of ``--method direct``.

    OUT/metadata.csv              the columns of pair_data.py, then teacher_num_inference_steps, teacher_cfg_scale, model
    OUT/latents-00000.safetensors latents (n, C, H, W) fp32: the rows of metadata.csv in order, ``shard_size`` a file;
                                  with --states also states (n, N - 1, C, H, W) and the student's grid (N + 1,)
    OUT/images/00000000.png       with --images

``num_inference_steps`` and ``cfg_scale`` are the student's, as in DiffSynth-Studio, which reads the table and images as they
are.  The noise of a row is ``torch.Generator("cpu").manual_seed(seed)``'s and is not stored.  Under a launcher each process
renders its share of the files.  OUT/pairs.json ties them to the settings and to a digest of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train_t2i.cli import parse_verb
from train_t2i.config import FAMILY_NAMES, flag
from train_t2i.errors import EXIT_DONE, UserError


@dataclass(frozen=True)
class PairsConfig:
    """Render prompts with the teacher and keep (noise seed, prompt, final latent)."""

    out: str = flag("pairs", "folder to write")
    pretrained_model: str = flag("stabilityai/stable-diffusion-xl-base-1.0", "teacher")
    vae: str | None = flag(None, "VAE to use instead of the model's own")
    data_path_train: str = flag(
        "t2i-2m-filtered-prompts.txt", "prompts; of an edit model: image table with source_file_path and text"
    )
    count: int = flag(10_000, "pairs in all", low=1)
    num_inference_steps: int = flag(25, "teacher steps", low=1, high=1000)
    cfg_scale: float = flag(7.0, "teacher guidance; 1: none", low=1)
    student_num_steps: int = flag(1, "steps of the student that the table names", low=1, high=500)
    states: bool = flag(False, "keep where the teacher is at the student's times too (train --states-weight)")
    shift: float = flag(1.0, "with --states: time shift of the student's grid; 0: the model's own", low=0)
    resolution: str = flag("1024", "image size in pixels: N or WIDTHxHEIGHT")
    batch_size: int = flag(8, "rows a batch", low=1)
    shard_size: int = flag(256, "rows a file", low=1)
    mixed_precision: str = flag("fp16", "number format of the network calls", choices=("no", "fp16", "bf16"))
    text_length: int = flag(0, "tokens of the longest text; 0: the pipeline's own", low=0)
    model_family: str = flag("auto", "architecture; auto reads model_index.json", choices=("auto", *FAMILY_NAMES))
    source_size: int = flag(1024, "of an edit model, as of train", low=32)
    source_seen_size: int = flag(384, "likewise", low=32)
    guidance_embed: float = flag(3.5, "what a guidance-distilled teacher (FLUX.1-dev) is told", low=0)
    seed: int = flag(30, "seed of the order of prompts and of the first row", low=0, high=2**62)
    images: bool = flag(False, "write the decoded images too")


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(PairsConfig, "pairs", arguments)
    if config.states and config.student_num_steps < 2:
        raise UserError("--states: a student of one step has none", "set --student-num-steps")
    if not config.states and config.shift != PairsConfig.shift:
        raise UserError("--shift does nothing without --states", "leave it out, or give --states")
    from train_t2i.pair_rendering import render

    render(config)
    return EXIT_DONE
