"""Inception-v3 as published FID and KID use it: torch-fidelity's network with a weights file that is given, never fetched.

The file is torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``, TensorFlow's weights of 2015 in torch's names.
Images are 8-bit and resized to 299 px as TensorFlow 1 did; features are the 2048 of the last pooling.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from rewards import RewardError
from rewards.weights import read_state
from train_t2i.errors import UserError


class Inception:
    """(B, 3, H, W) in [0, 1] -> (B, 2048) fp32."""

    def __init__(self, weights: str, device: torch.device) -> None:
        """Raises UserError where the file is not those weights, or torch-fidelity is not installed."""
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise UserError("--inception needs torch-fidelity", "pip install 'train-t2i[fid]'") from None
        try:
            state = read_state(Path(weights))
        except RewardError as error:
            raise UserError(f"--inception {error}") from None
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity would run a pickle of the user's file: it gets a copy of the tensors alone
            copy = Path(folder) / "weights.pth"
            torch.save(state, copy)
            try:
                network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(copy))
            except RuntimeError as error:
                raise UserError(
                    f"--inception {weights}: other weights ({str(error).splitlines()[-1].strip()})"
                ) from None
        self.network, self.device = network.to(device), device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        eight_bits = (images.clamp(0, 1) * 255).round().to(self.device, torch.uint8)
        return self.network(eight_bits)[0].float()
