"""FID against torchmetrics on torch-fidelity's own network."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import pixels, refused

from train_t2i.__main__ import main


@pytest.mark.slow
def test_fid_is_that_of_torchmetrics_on_the_same_network(runs, tmp_path, capsys, prompts_file, images_table):
    """With random weights, since the published ones are a download: the same file, resizing and features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    from train_t2i.evaluation import inception
    from train_t2i.student import load_student

    weights = tmp_path / "inception.pth"
    torch.manual_seed(0)
    torch.save(untrained_inception(), weights)
    out = tmp_path / "table.json"
    asked = [
        "evaluate",
        runs["one"],
        "--prompts",
        prompts_file,
        "--count",
        4,
        "--reference",
        images_table,
        "--out",
        out,
    ]
    assert main([*map(str, asked), "--inception", str(weights)]) == 0
    (row,) = json.loads(out.read_text())
    made = load_student(str(runs["one"])).images(prompts_file.read_text().splitlines()[:4], list(range(1000, 1004)))
    network = inception.Inception(str(weights), torch.device("cpu")).network
    theirs = FrechetInceptionDistance(feature=Flat(network)).set_dtype(torch.float64)
    theirs.update(
        torch.stack([pixels(images_table.parent / f"{i}.png").permute(2, 0, 1).byte() for i in range(6)]), real=True
    )
    theirs.update((made * 255).round().to(torch.uint8), real=False)
    assert row["fid"] == pytest.approx(float(theirs.compute()), rel=1e-3)
    assert row["fid"] > 0.1
    assert row["frechet"] is None
    assert len(row["scorers"]["weights_xxh3"]["inception"]) == 32
    torch.save({"fc.weight": torch.ones(2)}, weights)
    assert "other weights" in refused(capsys, *asked, "--inception", weights)
    weights.write_bytes(b"no weights")
    assert "--inception" in refused(capsys, *asked, "--inception", weights)


class Flat(torch.nn.Module):
    """A network of torch-fidelity as torchmetrics calls one; it keeps its own number format."""

    num_features = 2048

    def __init__(self, network):
        super().__init__()
        self.network = (network,)

    def forward(self, images):
        return self.network[0](images)[0].double()


def untrained_inception():
    """The tensors of torch-fidelity's Inception-v3, random, of a size that reaches the last layer."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    with pytest.raises(FileNotFoundError):  # its layers are there before it looks for their weights
        network.__init__("inception-v3-compat", ["2048"], "nowhere")
    state = network.state_dict()
    for tensor in state.values():
        if tensor.ndim == 4:
            torch.nn.init.kaiming_normal_(tensor)
    return state
