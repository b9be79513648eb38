"""PickScore and the aesthetic predictor against transformers' own model and processor, and every published shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from reward_towers import PROMPTS, random_images
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from rewards import REWARDS, Choices, RewardError
from rewards.blip import resolve, without_unused
from rewards.random_weights import authors_name, write
from rewards.weights import read_shapes, read_state

SIZE_PX = 32
SIZES = [(32, 32), (64, 64), (48, 80), (100, 37), (39, 32), (43, 32), (20, 31)]  # odd excesses tell floor from round


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parity")
    return {name: write(name, root / name) for name in ("pickscore", "aesthetic", "imagereward")}


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    """CLIP's, at our size, over the vocabulary that open_clip carries."""
    bpe = open_clip.tokenizer.SimpleTokenizer()
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.__getitem__)
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {marks.get(word, word): index for word, index in bpe.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=words, merges=[tuple(pair) for pair in merges])
    sides = {"size": {"shortest_edge": SIZE_PX}, "crop_size": {"height": SIZE_PX, "width": SIZE_PX}}
    return CLIPProcessor(CLIPImageProcessor(**sides), tokenizer)


def official_pickscore(
    model: CLIPModel, processor: CLIPProcessor, image: object, prompt: str, **how: bool
) -> torch.Tensor:
    """As PickScore's readme has it."""
    pixels = processor(images=image, padding=True, truncation=True, max_length=77, return_tensors="pt", **how)
    told = processor(text=[prompt], padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels["pixel_values"].to(model.dtype), **told)
    image_embeds = out.image_embeds / out.image_embeds.norm(dim=-1, keepdim=True)
    text_embeds = out.text_embeds / out.text_embeds.norm(dim=-1, keepdim=True)
    return (model.logit_scale.exp() * (text_embeds @ image_embeds.T))[0]


@pytest.mark.parametrize("size", SIZES)
def test_pickscore_equals_transformers(
    size: tuple[int, int], folders: dict[str, Path], processor: CLIPProcessor
) -> None:
    """In fp64 on pixels that nobody rounds: square, portrait, landscape, enlarged."""
    model = CLIPModel.from_pretrained(folders["pickscore"], dtype=torch.float64).eval()
    reward = REWARDS["pickscore"](folders["pickscore"], dtype=torch.float64)
    image, prompt = random_images(1, *size, dtype=torch.float64), PROMPTS[1]
    expected = official_pickscore(model, processor, image, prompt, do_rescale=False)
    torch.testing.assert_close(reward.scores(image, [prompt]), expected, atol=1e-5, rtol=0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("prompt", [*PROMPTS, "a very long story of a cat " * 20, "don't  SHOUT, 1920's\tcafé!"])
def test_pickscore_reads_prompts_as_transformers_do(
    prompt: str, folders: dict[str, Path], processor: CLIPProcessor
) -> None:
    """In fp32, on an 8-bit picture of the tower's own size, through PIL: nothing is resampled."""
    picture = np.random.default_rng(0).integers(0, 256, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    model = CLIPModel.from_pretrained(folders["pickscore"]).eval()
    expected = official_pickscore(model, processor, Image.fromarray(picture), prompt)
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    score = REWARDS["pickscore"](folders["pickscore"])(images, [prompt])
    torch.testing.assert_close(score, expected, atol=2e-5, rtol=0)  # of a score near 20
    cosine = REWARDS["pickscore"](folders["pickscore"], choices=Choices(logit_scale=False))(images, [prompt])
    torch.testing.assert_close(cosine * 100, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_the_aesthetic_score_equals_its_parts_composed(size: tuple[int, int], folders: dict[str, Path]) -> None:
    """transformers' image tower, the head as the authors declare it, torchvision's preprocessing as OpenAI's CLIP has it."""
    folder = folders["aesthetic"]
    model = CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
    width = model.config.projection_dim
    official = nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16), nn.Linear(16, 1),
    ).eval().double()  # fmt: skip
    state = torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    official.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in state.items()})
    transform = open_clip.image_transform(SIZE_PX, is_train=False, resize_mode="shortest")
    image = random_images(1, *size, dtype=torch.float64)
    with torch.no_grad():
        features = model.visual_projection(model.vision_model(transform(image[0])[None]).pooler_output)
        expected = official(features / features.norm(dim=-1, keepdim=True))[:, 0]
    reward = REWARDS["aesthetic"](folder, dtype=torch.float64)
    torch.testing.assert_close(reward.scores(image, ["whatever"]), expected, atol=1e-6, rtol=0)  # type: ignore[attr-defined]


def test_the_towers_layout_does_not_matter(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same tower under open_clip's names, with open_clip's config, scores bitwise the same."""
    from rewards import pickscore, tower

    source = tower.resolve(folders["pickscore"], pickscore.SPEC)
    state = tower.load_model(source, torch.float32, torch.device("cpu")).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "tower.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": source.model_cfg}))
    images = random_images(2, 40, 50)
    scores = [REWARDS["pickscore"](folder)(images, PROMPTS[:2]) for folder in (folders["pickscore"], tmp_path)]
    assert torch.equal(*scores)


def test_imagereward_takes_what_blips_pretraining_left_in_the_file(folders: dict[str, Path], tmp_path: Path) -> None:
    """Projections and positions stand in the published file and take no part in the score; nothing else may."""
    state = read_state(folders["imagereward"])
    images = random_images(2, 40, 50)
    expected = REWARDS["imagereward"](folders["imagereward"])(images, PROMPTS[:2])
    extra = {
        "blip.vision_proj.weight": torch.ones(256, 128), "blip.vision_proj.bias": torch.ones(256),
        "blip.text_proj.weight": torch.ones(256, 64), "blip.text_proj.bias": torch.ones(256),
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
    }  # fmt: skip
    torch.save(state | extra, tmp_path / "ImageReward.pt")
    with pytest.raises(RewardError, match=r"vocab\.txt: there is no such file; put bert-base-uncased's"):
        REWARDS["imagereward"](tmp_path)
    words = (folders["imagereward"].parent / "vocab.txt").read_text()
    for damaged, message in ((words.replace("[SEP]", "[XXX]"), r"has no \[SEP\]"), (words + "more\n", "has 201 words")):
        (tmp_path / "vocab.txt").write_text(damaged)
        with pytest.raises(RewardError, match=message):
            REWARDS["imagereward"].inspect(tmp_path)
    (tmp_path / "vocab.txt").write_text(words)
    assert torch.equal(REWARDS["imagereward"](tmp_path)(images, PROMPTS[:2]), expected)
    (tmp_path / "med_config.json").write_text('{"num_attention_heads": 2, "hidden_act": "gelu"}')
    assert not torch.equal(REWARDS["imagereward"](tmp_path)(images, PROMPTS[:2]), expected)
    (tmp_path / "med_config.json").write_text("{")
    with pytest.raises(RewardError, match=r"med_config\.json: cannot be read as JSON"):
        REWARDS["imagereward"].inspect(tmp_path)
    (tmp_path / "med_config.json").unlink()
    torch.save(state | {"blip.itm_head.weight": torch.ones(2, 64)}, tmp_path / "ImageReward.pt")
    with pytest.raises(RewardError, match="does not belong"):
        REWARDS["imagereward"].inspect(tmp_path)


# --- published shapes ------------------------------------------------------------------------------------------------


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file with a whole header in fp16 and a hole where its tensors would be."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published shapes, as holes: writes headers where ``random_weights`` would write gigabytes."""
    import rewards.random_weights as module

    def hollow(state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return dict(state)

    def save(state: dict[str, torch.Tensor], path: Path) -> None:
        sparse(path, {name: tuple(tensor.shape) for name, tensor in state.items()})

    monkeypatch.setattr(module, "filled", hollow)
    monkeypatch.setattr(module, "save_file", save)
    monkeypatch.setattr(module.torch, "save", save)


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize(
    ("name", "millions", "size_px"),
    [("pickscore", 986.109441, 224), ("aesthetic", 427.616513 + 0.927_969, 224), ("imagereward", 446.206689, 224)],
)
def test_published_shapes_are_accepted(name: str, millions: float, size_px: int, tmp_path: Path) -> None:
    report = REWARDS[name].inspect(write(name, tmp_path, small=False))
    assert report.num_parameters / 1e6 == pytest.approx(millions, rel=1e-6)
    assert report.image_size_px == (size_px, size_px)
    if name != "imagereward":  # what a file says of itself and what is known of it without a config are the same
        (tmp_path / "config.json").unlink()
        assert REWARDS[name].inspect(tmp_path if name == "aesthetic" else tmp_path / "model.safetensors") == report


def test_names_of_imagereward_go_there_and_back(folders: dict[str, Path]) -> None:
    shapes = read_shapes(folders["imagereward"])
    assert {authors_name(name): shape for name, shape in without_unused(shapes).items()} == shapes
    assert resolve(folders["imagereward"]).image_size_px == 32
