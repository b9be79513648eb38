"""Records what the authors' own packages score, for tests/test_official_scores.py to compare with.

    python tests/official/record.py

Needs uv on the PATH, and a package index.  The packages (hpsv2 1.2.0, image-reward 1.5) pin old libraries that nothing in
their scoring needs, so they cannot be dependencies; they are unpacked without their own into a temporary folder.  What they
import and the scoring never calls is replaced by empty modules; hpsv2's wheel lacks the vocabulary, which is open_clip's.
Both read weights of ``rewards.random_weights``, whose digest goes into the record: should torch's random numbers ever change,
the test says so instead of calling a reward wrong.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from official.inputs import PROMPTS, SIZES, digest, picture  # noqa: E402

from rewards.random_weights import BLIP_SMALL, SMALL, write  # noqa: E402
from rewards.weights import read_state  # noqa: E402

PACKAGES = ("hpsv2==1.2.0", "clint==0.5.1", "image-reward==1.5")
RECORD = Path(__file__).with_name("scores.json")


def install(folder: Path) -> None:
    command = ["uv", "pip", "install", "--python", sys.executable, "--no-deps", "--target", str(folder), *PACKAGES]
    subprocess.run(command, check=True)
    vocabulary = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    shutil.copy(vocabulary, folder / "hpsv2/src/open_clip")
    sys.path.insert(0, str(folder))


def hpsv2_scores(folder: Path, antialias: bool) -> list[float]:
    """``hpsv2.img_score.score`` on towers of our size."""
    import hpsv2.img_score as package
    from hpsv2.src.open_clip import factory
    from hpsv2.src.open_clip import transform as transforms

    checkpoint = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": read_state(write("hpsv2", folder) / "open_clip_model.safetensors")}, checkpoint)
    factory._MODEL_CONFIGS["ViT-H-14"] = SMALL
    package.model_dict.clear()

    def create(name: str, pretrained: str, **options: Any) -> Any:
        return factory.create_model_and_transforms(name, None, **options | {"precision": "fp32", "device": "cpu"})

    package.device = "cpu"
    resize = transforms.F.resize
    with (
        mock.patch.object(package, "create_model_and_transforms", create),
        mock.patch.object(transforms.F, "resize", lambda *given: resize(*given, antialias=antialias)),
    ):
        return [
            float(package.score(Image.fromarray(picture(*size)), prompt, str(checkpoint), hps_version="v2.1")[0])
            for size, prompt in zip(SIZES, PROMPTS)
        ]


def imagereward_scores(folder: Path) -> list[float]:
    """``ImageReward.score`` on a model of our size, its weights read as its ``load`` reads them."""
    empty_modules()
    from ImageReward.ImageReward import MLP, _transform
    from ImageReward.ImageReward import ImageReward as Official
    from ImageReward.models.BLIP import blip, blip_pretrain, med
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    size_px, patch_px, width, layers, mlp, text_width, text_layers, text_mlp, words = BLIP_SMALL
    weights = write("imagereward", folder)
    known = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().splitlines())}
    med_config = {
        "vocab_size": words + 2, "hidden_size": text_width, "num_hidden_layers": text_layers, "num_attention_heads": text_width // 64,
        "intermediate_size": text_mlp, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0, "type_vocab_size": 2,
        "add_cross_attention": True, "is_decoder": False, "chunk_size_feed_forward": 0,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(med_config))

    sizes = {
        "img_size": size_px,
        "patch_size": patch_px,
        "embed_dim": width,
        "depth": layers,
        "mlp_ratio": mlp / width,
    }
    vision = VisionTransformer(**sizes, num_heads=width // 64)

    with (
        mock.patch.object(blip.BertTokenizer, "from_pretrained", return_value=BertTokenizer(vocab=known)),
        mock.patch.object(blip_pretrain, "create_vit", return_value=(vision, width)),
        mock.patch.object(med.BertModel, "init_weights"),  # every weight is read below
        mock.patch("ImageReward.ImageReward.MLP", return_value=MLP(text_width)),
    ):
        # `enc_token_id`, which no score reads, comes from an attribute that transformers has no more
        blip_pretrain.init_tokenizer = lambda: marked(blip.BertTokenizer.from_pretrained("bert-base-uncased"))
        model = Official(str(folder / "med_config.json"))
    found = model.load_state_dict(read_state(weights), strict=False)
    assert not found.unexpected_keys, found
    assert all(
        name.startswith(("blip.vision_proj", "blip.text_proj")) or "position_ids" in name for name in found.missing_keys
    )
    model.eval()
    # two methods of every model in transformers 4, which 5 has no more: nothing is masked from the image, and no head is
    med.BertModel.invert_attention_mask = lambda self, mask: (
        (1.0 - mask[:, None, None, :]) * torch.finfo(torch.float32).min
    )
    med.BertModel.get_head_mask = lambda self, mask, layers: [None] * layers
    model.preprocess = _transform(size_px)
    scores = []
    for size, prompt in zip(SIZES, PROMPTS):
        path = folder / "image.png"
        Image.fromarray(picture(*size)).save(path)
        scores.append(model.score(prompt, str(path)))
    return scores


def marked(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


def empty_modules() -> None:
    """What image-reward imports, libraries no longer have, and its ``score`` never calls."""
    import transformers.modeling_utils
    import transformers.pytorch_utils

    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        value = getattr(transformers.pytorch_utils, name, None)
        setattr(transformers.modeling_utils, name, value)
    fakes = {
        "clip": (), "fairscale": (), "fairscale.nn": (), "fairscale.nn.checkpoint": (),
        "fairscale.nn.checkpoint.checkpoint_activations": ("checkpoint_wrapper",),
        "timm.models.hub": ("download_cached_file",), "timm.models.registry": ("register_model",),
        "ImageReward.ReFL": (),
    }  # fmt: skip
    for name, attributes in fakes.items():
        module = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, None)
        sys.modules[name] = module
    root = types.ModuleType("ImageReward")  # without its __init__, which imports the training code
    root.__path__ = [str(Path(path) / "ImageReward") for path in sys.path if (Path(path) / "ImageReward").is_dir()]
    sys.modules["ImageReward"] = root


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        install(folder / "packages")
        record = {
            "packages": list(PACKAGES),
            "libraries": {
                name: importlib.metadata.version(name) for name in ("torch", "torchvision", "transformers", "timm")
            },
            "pictures": digest(np.concatenate([picture(*size).ravel() for size in SIZES])),
            "hpsv2": {
                "weights": digest(read_state(write("hpsv2", folder / "hps") / "open_clip_model.safetensors")),
                "antialiased": hpsv2_scores(folder / "hps", True),
                "not antialiased": hpsv2_scores(folder / "hps", False),
            },
            "imagereward": {
                "weights": digest(read_state(write("imagereward", folder / "ir"))),
                "scores": imagereward_scores(folder / "ir"),
            },
        }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(RECORD.read_text())


if __name__ == "__main__":
    main()
