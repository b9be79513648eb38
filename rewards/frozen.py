"""What every reward with weights has in common: where it runs, in which precision, and the way in for images.

Shapes: B batch, H and W px of the images, h and w of the tower's input.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rewards.base import check_rows
from rewards.preprocess import Preprocess


class FrozenReward(ABC):
    """A reward with frozen weights.

    ``dtype`` is that of the layers; preprocessing and the scores are fp32, or fp64 in ``scores`` where the layers are
    fp64, which serves checks of the gradient.  An autocast around the call changes nothing.  ``checkpointing`` spends a
    second forward pass of the image tower to save its activations.  A row's score depends on its own image and prompt
    alone.
    """

    differentiable = True
    name: str

    def __init__(
        self, name: str, preprocess: Preprocess, dtype: torch.dtype, device: str | torch.device, checkpointing: bool
    ) -> None:
        self.name = name
        self.preprocess = preprocess
        self.dtype = dtype
        self.device = torch.device(device)
        self.checkpointing = checkpointing
        self.wide = torch.promote_types(dtype, torch.float32)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, tick: int = 0) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) fp32.  Gradients reach ``images``."""
        return self.scores(images, prompts).float()

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As the call, in fp64 where the layers are fp64."""
        check_rows(self.name, images, prompts)
        if not prompts:
            return images.new_zeros(0, dtype=self.wide)
        with torch.autocast(self.device.type, enabled=False):
            return self._scores(images, prompts)

    @abstractmethod
    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score, outside autocast."""

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, h, w), what the image tower reads, in the layers' precision."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"{self.name}: images are (B, 3, H, W) floats, not {tuple(images.shape)} {images.dtype}")
        return self.preprocess(images.to(self.device, self.wide)).to(self.dtype)


_LOADED: weakref.WeakValueDictionary[Hashable, nn.Module] = weakref.WeakValueDictionary()


def load_once(file: Path, how: Hashable, load: Callable[[], nn.Module]) -> nn.Module:
    """The module that an earlier reward made of the same file in the same way, while it lives; else ``load()``.

    Frozen weights can be shared: two rewards of one tower then cost the memory of one.  A file that changed is read
    again.
    """
    stat = file.stat()
    key = (str(file.resolve()), stat.st_size, stat.st_mtime_ns, how)
    module = _LOADED.get(key)
    if module is None:
        module = _LOADED[key] = load()
    return module
