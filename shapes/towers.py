"""The tiny reward towers: CLIP (contrastive), its HPS sibling (preferences) and a held-out judge, all in open_clip's formats.

A reward that is followed by gradient is soon fooled, so the towers see more than clean scenes: captions that are wrong in
exactly one word, pictures with objects missing or doubled, mush, decoder output, and pictures moved along the towers' own gradient.
Shapes: B pictures, K wrong captions a picture, D embedding.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIP, SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

from shapes import degrade
from shapes.muon import mark_tables
from shapes.parallel import WORKERS, fit
from shapes.text_encoders import Heads
from shapes.tokenizer import new_tokenizer, world_words
from shapes.world import World, batch_index, generator
from shapes.wrong_captions import CONTEXT, Captions

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TowerRecipe:
    """Architecture and training of one tower."""

    seed: int = 31
    embed_dim: int = 64
    vision: tuple[int, int, int] = (3, 64, 32)  # layers, width, head width
    text: tuple[int, int, int] = (4, 32, 2)  # layers, width, heads
    steps: int = 1200
    batch_size: int = 48
    wrong_captions: int = 2
    learning_rate: float = 2e-3
    max_scale: float = 30.0  # a softer limit than CLIP's 100: the reward keeps a slope
    adversarial_every: int = 2


def model_config(recipe: TowerRecipe, vocab_size: int) -> dict[str, Any]:
    """open_clip's model_cfg."""
    layers, width, head = recipe.vision
    text_layers, text_width, text_heads = recipe.text
    vision_cfg = {
        "image_size": 64,
        "layers": layers,
        "width": width,
        "head_width": head,
        "patch_size": 8,
        "mlp_ratio": 2.0,
    }
    text_cfg = {
        "context_length": CONTEXT,
        "vocab_size": vocab_size,
        "width": text_width,
        "heads": text_heads,
        "layers": text_layers,
        "mlp_ratio": 2.0,
    }
    return {"embed_dim": recipe.embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def normalise(images: Tensor) -> Tensor:
    """[0, 1] pictures -> CLIP's input."""
    return (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


class Trainee(nn.Module):
    """A tower, and the linear readers that help it to learn (they are thrown away)."""

    def __init__(self, config: dict[str, Any], embed_dim: int) -> None:
        super().__init__()
        self.clip = CLIP(**config)
        self.readers = Heads(embed_dim)
        self.text_readers = Heads(embed_dim)

    def image(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(normalise(images), normalize=True)

    def text(self, ids: Tensor) -> Tensor:
        return self.clip.encode_text(ids, normalize=True)


def similarity_losses(
    model: Trainee, good: Tensor, bad: Tensor, ids: Tensor, wrong_ids: Tensor, labels: Tensor, max_scale: float
) -> Tensor:
    """CLIP's loss with hard negatives on both sides, and attribute reading.

    good: (B, ...) pictures that fit; bad: (B, ...) spoiled versions, row by row; ids (B, L); wrong_ids (B*K, L); labels (B, 8).
    """
    b = len(good)
    seen, spoiled = model.image(torch.cat([good, bad])).split(b)
    said, mis = model.text(torch.cat([ids, wrong_ids])).split([b, len(wrong_ids)])
    scale = model.clip.logit_scale.exp().clamp(max=max_scale)
    same = (labels[:, None] == labels[None]).all(-1) & ~torch.eye(b, dtype=torch.bool)
    target = torch.arange(b)
    among = (scale * seen @ said.T).masked_fill(same, -1e4)
    near = scale * torch.einsum("bd,bkd->bk", seen, mis.view(b, -1, mis.shape[-1]))
    to_text = F.cross_entropy(torch.cat([among, near], 1), target)
    ruined = scale * (spoiled * said).sum(
        1, keepdim=True
    )  # only one's own spoiled picture: another's may fit by chance
    to_image = F.cross_entropy(torch.cat([among.T, ruined], 1), target)
    return to_text + to_image + model.readers.loss(10 * seen, labels) + model.text_readers.loss(10 * said, labels)


def push(score: Callable[[Tensor], Tensor], images: Tensor, size: float, g: torch.Generator) -> Tensor:
    """Move pictures along the smoothed gradient of their score, by at most `size`: what reward hacking does."""
    x = images.detach().requires_grad_()
    (slope,) = torch.autograd.grad(score(x).sum(), x)
    coarse = int(torch.randint(8, 65, (1,), generator=g))
    slope = F.interpolate(F.interpolate(slope, coarse, mode="area"), 64, mode="bilinear")
    unit = slope / slope.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
    reach = size * torch.rand(len(x), 1, 1, 1, generator=g)
    return (images + reach * unit.clamp(-2, 2) / 2).clamp(0, 1).detach()


def spoiled(model: Trainee, images: Tensor, ids: Tensor, adversarial: bool, g: torch.Generator) -> Tensor:
    """Pictures that no longer deserve their captions; half of them moved towards fooling the tower when `adversarial`."""
    half = len(images) // 2
    bad = torch.cat([degrade.wrong(images[:half], g), degrade.poor(images[half:], g)])
    bad = degrade.light(bad, g)
    if adversarial:
        rows = torch.arange(int(torch.randint(2, (1,), generator=g)), len(images), 2)
        with torch.no_grad():
            said = model.text(ids[rows])
        bad[rows] = push(lambda x: (model.image(x) * said).sum(1), bad[rows], 0.15, g)
    return bad


@dataclass(frozen=True)
class Part:
    """What one thread needs of a step: sample numbers, captions, wrong captions, random numbers, the step."""

    index: Tensor
    ids: Tensor
    wrong_ids: Tensor
    labels: Tensor
    g: torch.Generator
    step: int


def part_maker(world: World, captions: Captions, recipe: TowerRecipe) -> Callable[[int], list[Part]]:
    """The batches of a run by step."""

    def parts(step: int) -> list[Part]:
        index = batch_index(recipe.seed, step, recipe.batch_size, len(world))
        wrong_ids = captions.wrong(index, recipe.wrong_captions, recipe.seed, step)
        rows = zip(index.chunk(WORKERS), wrong_ids.chunk(WORKERS))
        return [
            Part(i, captions.ids[i], w, captions.labels[i], generator(recipe.seed, step, 1 + n), step)
            for n, (i, w) in enumerate(rows)
        ]

    return parts


def new_trainee(recipe: TowerRecipe) -> Trainee:
    """An untrained tower over the cut vocabulary."""
    model = Trainee(model_config(recipe, len(new_tokenizer(CONTEXT))), recipe.embed_dim)
    mark_tables(model)
    return model


def train_clip(world: World, extra: Tensor, recipe: TowerRecipe, name: str) -> Trainee:
    """Contrastive training.  extra: (M, 3, 64, 64) uint8, decoder output of the first M pictures, mixed in."""
    torch.manual_seed(recipe.seed)
    captions = Captions(world)
    model = new_trainee(recipe)

    def loss(part: Part) -> Tensor:
        images = with_decoded(world, extra, part.index, part.g)
        bad = spoiled(model, images, part.ids, part.step % recipe.adversarial_every == 0, part.g)
        good = degrade.light(images, part.g)
        return similarity_losses(model, good, bad, part.ids, part.wrong_ids, part.labels, recipe.max_scale)

    parts = part_maker(world, captions, recipe)
    fit(name, loss, parts, list(model.parameters()), recipe.steps, recipe.learning_rate, weight_decay=0.05)
    return model.eval()


def train_hps(start: Trainee, world: World, extra: Tensor, recipe: TowerRecipe, name: str) -> Trainee:
    """Preferences: right over wrong caption and picture, crisp over soft, clean over noisy, on top of the contrast.

    Scores are compared at temperature 1/20, so that a preference is worth 0.1 to 0.2 of cosine and no more.
    """
    model = copy.deepcopy(start).train()
    mark_tables(model)
    captions = Captions(world)

    def prefer(better: Tensor, worse: Tensor) -> Tensor:
        return F.softplus(-20 * (better - worse)).mean()

    def loss(part: Part) -> Tensor:
        g = part.g
        images = with_decoded(world, extra, part.index, g)
        bad = spoiled(model, images, part.ids, part.step % recipe.adversarial_every == 0, g)
        good = (images + 0.01 * torch.randn(images.shape, generator=g)).clamp(0, 1)
        mid = good.lerp(degrade.poor(images, g), 0.15 + 0.45 * torch.rand(len(images), 1, 1, 1, generator=g))
        said = model.text(part.ids)
        wrong = model.text(part.wrong_ids).view(len(said), -1, said.shape[-1])
        seen = model.image(torch.cat([good, mid, bad])).chunk(3)
        best, middle, worst = ((one * said).sum(1) for one in seen)
        missed = torch.einsum("bd,bkd->bk", seen[0], wrong)
        ranked = prefer(best, middle) + prefer(best, worst) + prefer(best[:, None], missed)
        soft = degrade.light(images, g)
        kept = similarity_losses(model, soft, bad, part.ids, part.wrong_ids, part.labels, recipe.max_scale)
        return ranked + 0.5 * kept

    parts = part_maker(world, captions, recipe)
    fit(name, loss, parts, list(model.parameters()), recipe.steps, recipe.learning_rate, weight_decay=0.05)
    return model.eval()


def with_decoded(world: World, extra: Tensor, index: Tensor, g: torch.Generator) -> Tensor:
    """Pictures of a batch; a third of those that also exist as decoder output are taken from there."""
    images = world.images(index)
    if len(extra):
        use = (torch.rand(len(index), generator=g) < 0.35) & (index < len(extra))
        images[use] = extra[index[use]].float() / 255
    return images


def widen_vocabulary(table: Tensor) -> Tensor:
    """Move the rows of the cut vocabulary to their places in CLIP's: (V, W) -> (49408, W).

    Towers train on the cut vocabulary for speed, and are saved for open_clip's own tokenizer, which splits the words of
    this world alike.  Words that were never seen get zeros: they say nothing, and cost nothing once compressed.
    """
    ours = new_tokenizer(CONTEXT)
    theirs = SimpleTokenizer()
    wide = torch.zeros(theirs.vocab_size, table.shape[1], dtype=table.dtype)
    for word in [*world_words(), ","]:
        wide[theirs.encode(word)] = table[ours.encode(word, add_special_tokens=False)]  # "cyan" is two pieces
    wide[theirs.sot_token_id], wide[theirs.eot_token_id] = table[ours.bos_token_id], table[ours.eos_token_id]
    return wide


def save_tower(model: CLIP, recipe: TowerRecipe, folder: Path, hps_file: str | None = None) -> None:
    """Write an open_clip folder in half precision; with `hps_file` the weights are saved as HPSv2.1's are."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    key = "token_embedding.weight"
    state[key] = widen_vocabulary(state[key])
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model_config(recipe, len(state[key])), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if hps_file:
        torch.save({"state_dict": state}, folder / hps_file)
    else:
        save_file(state, folder / "open_clip_model.safetensors")
