"""Qwen-Image-Edit and -Plus against diffusers: what the network is fed, with one source and with several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus_module
from edit_models import PIPELINES, load_edit, picture, save_edit
from PIL import Image
from test_flow_families import Recorder
from torch import Tensor

from train_t2i.errors import UserError
from train_t2i.families import Cond, Source, family_of, load_family
from train_t2i.families.flow import pack
from train_t2i.sizes import source_sizes

INSTRUCTIONS = ["make the circle blue", "move the small red circle to the left of the large green cross"]
AREA_SIDE, SEEN_SIDE = 64, 48
HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("edit")
    return {name: save_edit(root / name, name) for name in PIPELINES}


def as_source(image: Image.Image, family: str, side: int = AREA_SIDE, seen: int = SEEN_SIDE) -> Source:
    """As the data has it: diffusers' sizes, Lanczos."""
    sizes = source_sizes(image.height, image.width, side, seen if family == "qwen_image_edit_plus" else None)

    def at(size: tuple[int, int]) -> Tensor:
        scaled = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)

    return Source(at(sizes.pixels), at(sizes.seen))


@pytest.fixture
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plus_module, "VAE_IMAGE_SIZE", AREA_SIDE**2)
    monkeypatch.setattr(plus_module, "CONDITION_IMAGE_SIZE", SEEN_SIDE**2)


def noise(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(seed))


def ours(folder: Path, **options: Any) -> Any:
    return load_family("auto", str(folder), size_px=(HEIGHT, WIDTH), **options)


def with_token_types(pipe: Any) -> Any:
    """The stock pipeline with the argument that it leaves out, given by hand."""
    encoder, stock = pipe.text_encoder, pipe.text_encoder.forward

    def forward(**named: Any) -> Any:
        is_image = named["input_ids"] == encoder.config.image_token_id
        return stock(**named, mm_token_type_ids=is_image.int())

    encoder.forward = forward
    return pipe


def fed_by_pipeline(pipe: Any, images: Sequence[Image.Image], **told: Any) -> list[dict[str, Any]]:
    recorder = Recorder(pipe.transformer)
    pipe(list(images) if len(images) > 1 else images[0], INSTRUCTIONS[0], num_inference_steps=2, output_type="latent",
         true_cfg_scale=1.0, **told)  # fmt: skip
    return recorder.calls


def fed_by_us(family: Any, images: Sequence[Image.Image], x: Tensor, name: str, **areas: int) -> dict[str, Any]:
    net = family.load(torch.float32)
    recorder = Recorder(net)
    row = [as_source(image, name, **areas) for image in images]
    with torch.no_grad():
        family.call(net, x, family.path.dense_grid(2)[:1], family.encode(INSTRUCTIONS[:1], None, [row]))
    return recorder.calls[0]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[key].float(), value.float(), rtol=0, atol=1e-6, msg=key)
        elif key != "attention_kwargs":
            assert found.get(key) == value, key


@pytest.mark.parametrize("name", PIPELINES)
def test_auto_reads_the_family_off_the_folder(name: str, folders: dict[str, Path]) -> None:
    assert family_of(str(folders[name])) == name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_plus_is_fed_what_its_pipeline_feeds_it(count: int, folders: dict[str, Path], small_areas: None) -> None:
    """Noisy and source tokens, text tokens, img_shapes, time: of one, two and three sources of several shapes."""
    name = "qwen_image_edit_plus"
    images = [picture(90, 60, 1), picture(60, 100, 2), picture(64, 64, 3)][:count]
    pipe, x = with_token_types(load_edit(folders[name], name)), noise()
    expected = fed_by_pipeline(pipe, images, height=HEIGHT, width=WIDTH, latents=pack(x))[0]
    assert_same(fed_by_us(ours(folders[name]), images, x, name), expected)


def test_edit_is_fed_what_its_pipeline_feeds_it_at_its_own_area(folders: dict[str, Path]) -> None:
    """One source of a million pixels, which the text encoder and the VAE both see."""
    name = "qwen_image_edit"
    pipe, x = with_token_types(load_edit(folders[name], name)), noise()
    image = picture(80, 50, 1)
    expected = fed_by_pipeline(pipe, [image], height=HEIGHT, width=WIDTH, latents=pack(x))[0]
    assert expected["img_shapes"] == [[(1, 3, 4), (1, 50, 80)]]
    assert_same(fed_by_us(ours(folders[name]), [image], x, name, side=1024), expected)


def test_plus_at_its_own_areas(folders: dict[str, Path]) -> None:
    name = "qwen_image_edit_plus"
    pipe, x, image = with_token_types(load_edit(folders[name], name)), noise(), picture(50, 80, 1)
    expected = fed_by_pipeline(pipe, [image], height=HEIGHT, width=WIDTH, latents=pack(x))[0]
    assert_same(fed_by_us(ours(folders[name]), [image], x, name, side=1024, seen=384), expected)


def test_stock_pipelines_lack_the_token_types_and_read_images_as_a_line(
    folders: dict[str, Path], small_areas: None
) -> None:
    """What the fix is for; when this fails, diffusers passes them and ``tell_token_types`` can go."""
    name = "qwen_image_edit_plus"
    image, x = picture(90, 60, 1), noise()
    stock = fed_by_pipeline(load_edit(folders[name], name), [image], height=HEIGHT, width=WIDTH, latents=pack(x))[0]
    mine = fed_by_us(ours(folders[name]), [image], x, name)
    difference = (mine["encoder_hidden_states"] - stock["encoder_hidden_states"]).abs().max()
    assert difference > 1e-4


def test_2511_gives_source_tokens_a_time_of_their_own(tmp_path: Path, small_areas: None) -> None:
    """``zero_cond_t`` comes with the transformer's config: what it predicts equals the pipeline's, and differs from without."""
    name = "qwen_image_edit_plus"
    plain, zeroed = save_edit(tmp_path / "a", name), save_edit(tmp_path / "b", name, zero_cond_t=True)
    images, x = [picture(90, 60, 1)], noise()
    row = [[as_source(image, name) for image in images]]
    found = []
    for folder in (plain, zeroed):
        family = ours(folder)
        with torch.no_grad():
            t = torch.tensor([0.7])
            found.append(family.call(family.load(torch.float32), x, t, family.encode(INSTRUCTIONS[:1], None, row)))
    pipe = with_token_types(load_edit(zeroed, name))
    fed = fed_by_us(ours(zeroed), images, x, name)
    expected = fed_by_pipeline(pipe, images, height=HEIGHT, width=WIDTH, latents=pack(x))[0]
    assert_same(fed, expected)
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("name", PIPELINES)
def test_a_batch_is_its_rows_alone(name: str, folders: dict[str, Path]) -> None:
    """Texts of unequal length, padded and masked; guided, so that the negative is told too; prediction and conditioning."""
    family = ours(folders[name])
    net, x, t = family.load(torch.float32), noise(2), torch.tensor([0.9, 0.4])
    rows = [[as_source(picture(90, 60, seed), name)] for seed in (1, 2)]
    with torch.no_grad():
        both = family.encode(INSTRUCTIONS, "", rows).with_negative()
        together = family.call(net, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        for i in range(2):
            here = slice(i, i + 1)
            alone = family.encode(INSTRUCTIONS[here], "", rows[here])
            assert alone.negative is not None
            torch.testing.assert_close(family.call(net, x[here], t[here], alone), together[1][here], atol=1e-5, rtol=0)
            away = Cond(alone.negative.tokens, mask=alone.negative.mask, context=alone.context, shapes=alone.shapes)
            torch.testing.assert_close(family.call(net, x[here], t[here], away), together[0][here], atol=1e-5, rtol=0)


def test_plus_trains_on_text_alone_too(folders: dict[str, Path], small_areas: None) -> None:
    """A row without sources is a text-to-image row: no pictures in its text, no tokens behind the noisy ones."""
    family = ours(folders["qwen_image_edit_plus"])
    cond = family.encode(INSTRUCTIONS, None, [[], []])
    assert cond.context == ()
    assert cond.shapes == ()
    assert family.call(family.load(torch.float32), noise(2), torch.tensor([0.5, 0.6]), cond).shape == noise(2).shape


def test_rows_of_other_source_sizes_are_no_batch(folders: dict[str, Path]) -> None:
    family = ours(folders["qwen_image_edit_plus"])
    wide, tall = (as_source(picture(*size, 1), "qwen_image_edit_plus") for size in ((120, 40), (40, 120)))
    conds = [family.encode(INSTRUCTIONS[:1], None, [[source]]) for source in (wide, tall)]
    with pytest.raises(ValueError, match="same sizes"):
        Cond.cat(conds)
    joined = Cond.cat([conds[0], conds[0]])
    assert joined.shapes == conds[0].shapes
    assert joined.context[0].shape[0] == 2


def test_a_folder_without_its_processor_is_named(tmp_path: Path) -> None:
    folder = save_edit(tmp_path / "m", "qwen_image_edit")
    (folder / "processor").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"m: has no processor/"):
        load_family("auto", str(folder))
