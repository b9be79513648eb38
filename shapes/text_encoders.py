"""The two tiny CLIP text encoders of the SDXL folder.

They stay frozen while the denoiser learns, so they must already know what a caption means.  They are trained together, against
pictures (contrastively, on the pooled outputs) and against the scene itself (linear heads on the penultimate hidden states, which
are what SDXL's cross-attention reads).
Shapes: B captions, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from shapes.muon import mark_tables
from shapes.parallel import WORKERS, fit
from shapes.scenes import BACKGROUNDS, COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, Scene, samples
from shapes.tokenizer import new_tokenizer
from shapes.world import World, batch_index, generator

MAX_LENGTH = 77
SHORT_LENGTH = 32  # every caption fits; most steps train on this many tokens for speed


@dataclass(frozen=True)
class TextRecipe:
    """How the text encoders are trained."""

    seed: int = 21
    widths: tuple[int, int] = (64, 96)
    layers: int = 3
    steps: int = 700
    batch_size: int = 64
    learning_rate: float = 2e-3
    long_every: int = 6  # every so many steps all 77 positions are trained


def attributes(scene: Scene) -> list[int]:
    """The scene as class numbers: background, layout, then size, colour, shape of two slots (-100 where there is none)."""
    layout = (*POSITIONS, *RELATIONS).index(scene.position or scene.relation or "")
    numbers = [BACKGROUNDS.index(scene.background), layout]
    for thing in scene.things:
        numbers += [SIZES.index(thing.size), COLOURS.index(thing.colour), SHAPES.index(thing.shape)]
    return numbers + [-100] * (8 - len(numbers))


_THING_CLASSES = (len(SIZES), len(COLOURS), len(SHAPES))
CLASSES = (len(BACKGROUNDS), len(POSITIONS) + len(RELATIONS), *_THING_CLASSES, *_THING_CLASSES)


class PatchEncoder(nn.Module):
    """(B, 3, 64, 64) -> (B, width): a small transformer over 8 px patches; only the other half of the contrast."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.place = nn.Parameter(0.02 * torch.randn(1, 64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images * 2 - 1).flatten(2).transpose(1, 2) + self.place
        return self.out(self.blocks(x).mean(1))


def new_text_encoders(
    recipe: TextRecipe, tokenizer: CLIPTokenizer
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Untrained encoders with SDXL's activations (quick_gelu, gelu) and conventions."""

    def config(width: int, act: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=width // 32,
            max_position_embeddings=MAX_LENGTH,
            hidden_act=act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    first, second = recipe.widths
    return CLIPTextModel(config(first, "quick_gelu")), CLIPTextModelWithProjection(config(second, "gelu"))


class Heads(nn.Module):
    """Linear readers of a hidden state, one an attribute."""

    def __init__(self, width: int, classes: tuple[int, ...] = CLASSES) -> None:
        super().__init__()
        self.readers = nn.ModuleList(nn.Linear(width, number) for number in classes)

    def forward(self, hidden: Tensor) -> list[Tensor]:
        return [reader(hidden) for reader in self.readers]

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden (B, D), labels (B, attributes) -> mean cross-entropy of the attributes that any row has."""
        told = enumerate(self(hidden))
        parts = [F.cross_entropy(out, labels[:, i]) for i, out in told if bool((labels[:, i] >= 0).any())]
        return torch.stack(parts).mean()

    def right(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(B,) bool: every attribute is read correctly."""
        hits = [(out.argmax(1) == labels[:, i]) | (labels[:, i] < 0) for i, out in enumerate(self(hidden))]
        return torch.stack(hits).all(0)


def contrast(a: Tensor, b: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric loss; pairs that mean the same scene (`same`, (B, B) bool) are no negatives.  a, b: (B, D)."""
    logits = scale.exp().clamp(max=100) * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    off = same & ~torch.eye(len(a), dtype=torch.bool)
    logits = logits.masked_fill(off, -1e4)
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _pad_ids(ids: Tensor, pad: int, eos: int) -> Tensor:
    """Replace all but the first end token by the pad token of the second tokenizer."""
    after = (ids == eos).long().cumsum(1) > 1
    return ids.masked_fill(after, pad)


@dataclass(frozen=True)
class TextTower:
    """Both encoders, their heads, and the picture side that they are contrasted with."""

    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    heads: nn.ModuleList
    picture: PatchEncoder
    out: nn.ModuleList
    scale: nn.Parameter

    def parameters(self) -> list[nn.Parameter]:
        modules = (*self.encoders, self.heads, self.picture, self.out)
        return [p for module in modules for p in module.parameters()] + [self.scale]


def new_tower(recipe: TextRecipe, tokenizer: CLIPTokenizer) -> TextTower:
    heads = nn.ModuleList(Heads(width) for width in recipe.widths)
    out = nn.ModuleList(nn.Linear(width, 64) for width in recipe.widths)
    scale = nn.Parameter(torch.tensor(2.3))
    return TextTower(new_text_encoders(recipe, tokenizer), heads, PatchEncoder(), out, scale)


def _hidden(tower: TextTower, ids: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Penultimate states of both encoders, and their pooled outputs."""
    first = tower.encoders[0](ids[0], output_hidden_states=True)
    second = tower.encoders[1](ids[1], output_hidden_states=True)
    return [first.hidden_states[-2], second.hidden_states[-2]], [first.pooler_output, second.text_embeds]


def _losses(tower: TextTower, ids: tuple[Tensor, Tensor], images: Tensor, labels: Tensor, g: torch.Generator) -> Tensor:
    states, pooled = _hidden(tower, ids)
    rows = torch.arange(len(labels))
    end = ids[0].argmax(1)
    some = end + ((ids[0].shape[1] - end) * torch.rand(len(end), generator=g)).long()  # any pad position knows as much
    same = (labels[:, None] == labels[None]).all(-1)
    seen = tower.picture(images)
    loss = torch.zeros(())
    for i in range(2):
        loss = loss + tower.heads[i].loss(states[i][rows, end], labels)  # type: ignore[operator]
        loss = loss + tower.heads[i].loss(states[i][rows, some], labels)  # type: ignore[operator]
        loss = loss + 0.3 * contrast(tower.out[i](pooled[i]), seen, tower.scale, same)
    return loss


def train_text_encoders(
    world: World, recipe: TextRecipe
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection, dict[str, float]]:
    """Train both encoders.  Returns them and how well the penultimate states tell whole unseen scenes."""
    torch.manual_seed(recipe.seed)
    tokenizer = new_tokenizer(MAX_LENGTH)
    tower = new_tower(recipe, tokenizer)
    for module in (*tower.encoders, tower.picture):
        mark_tables(module)
    all_ids = tokenizer(world.captions, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    labels = torch.tensor([attributes(scene) for scene in world.scenes])
    pad2 = tokenizer.convert_tokens_to_ids("!")

    def loss(part: tuple[Tensor, int, torch.Generator]) -> Tensor:
        index, length, g = part
        ids = all_ids[index, :length]
        both = (ids, _pad_ids(ids, pad2, tokenizer.eos_token_id))
        return _losses(tower, both, world.images(index), labels[index], g)

    def parts(step: int) -> list[tuple[Tensor, int, torch.Generator]]:
        index = batch_index(recipe.seed, step, recipe.batch_size, len(world))
        length = MAX_LENGTH if step % recipe.long_every == 0 else SHORT_LENGTH
        return [(part, length, generator(recipe.seed, step, 1 + i)) for i, part in enumerate(index.chunk(WORKERS))]

    fit("text encoders", loss, parts, tower.parameters(), recipe.steps, recipe.learning_rate, weight_decay=0.02)
    first, second = (encoder.eval().requires_grad_(False) for encoder in tower.encoders)
    return first, second, measure(tower, tokenizer)


@torch.no_grad()
def measure(tower: TextTower, tokenizer: CLIPTokenizer, count: int = 500) -> dict[str, float]:
    """Share of held-out captions whose scene the linear heads read whole from the penultimate end-token state."""
    drawn = list(samples("heldout", 0, count))
    ids = tokenizer([c for _, c in drawn], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    labels = torch.tensor([attributes(scene) for scene, _ in drawn])
    both = (ids, _pad_ids(ids, tokenizer.convert_tokens_to_ids("!"), tokenizer.eos_token_id))
    states, _ = _hidden(tower, both)
    end = ids.argmax(1)
    names = ("encoder 1", "encoder 2")
    rows = torch.arange(count)
    hits = [tower.heads[i].right(states[i][rows, end], labels).float().mean().item() for i in range(2)]  # type: ignore[operator]
    return dict(zip(names, hits))
