"""An ArcFlow student in stock diffusers: its own last layers, and the code that takes its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_t2i.adapters import Replaced
from train_t2i.errors import UserError
from train_t2i.student import ImageModel

CODE = Path(__file__).parents[1] / "policy_pipeline.py"


def own_layers(model: ImageModel) -> None:
    """Put the generator's own layers into the network, which stays one that stock diffusers loads: of more channels."""
    if model.settings.method.policy != "momentum":
        raise UserError(
            f"--policy {model.settings.method.policy} has no pipeline: its steps are more than one sum",
            "sample with python -m train_t2i sample",
        )
    net: Any = model.network
    norm, head = net.norm_out, net.proj_out
    assert isinstance(norm, Replaced)
    assert isinstance(head, Replaced)
    own: Any = head.own["generator"]
    net.norm_out, net.proj_out = norm.own["generator"], own.as_linear()
    net.register_to_config(out_channels=net.proj_out.out_features // net.config.patch_size**2)


def write_policy_code(pipeline: type, folder: Path) -> None:
    """``pipeline.py``, for the model's own pipeline class."""
    source = CODE.read_text(encoding="utf-8").replace("FluxPipeline", pipeline.__name__)
    (folder / "pipeline.py").write_text(source, encoding="utf-8")
