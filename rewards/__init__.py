"""Reward models: ``(images, prompts) -> scores``, each with its own differentiable preprocessing and frozen weights.

Importing this costs nothing; a reward's own file, and torch with it, is imported when it is inspected or built.  Adding
one is a file with ``build`` and ``inspect``, a line here, and a test.  ``find`` turns a name into what builds it, also
the name of a function of one's own (``module:function``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rewards.base import OFFICIAL, Choices, Reward, RewardError, WeightsReport

if TYPE_CHECKING:
    import torch

__all__ = [
    "OFFICIAL",
    "REWARDS",
    "TOWERS",
    "Builder",
    "Choices",
    "Reward",
    "RewardError",
    "WeightsReport",
    "find",
]


@dataclass(frozen=True)
class Builder:
    """A reward not imported yet."""

    module: str
    reads_prompts: bool = True
    function: str = ""  # module:function of the user's own, in place of weights

    def __call__(
        self,
        weights: str | Path | None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        checkpointing: bool = False,
        choices: Choices = OFFICIAL,
        sha256: Sequence[str] = (),
    ) -> Reward:
        """Loads the reward's weights, a file or a folder.  ``dtype`` None is fp32.  Raises RewardError.

        Each of ``sha256`` must be the digest of a file that the reward reads; without it a flipped bit goes unseen.
        """
        source = self._source(weights)
        if sha256:
            self.check_digests(source, sha256)
        options: dict[str, Any] = {"device": device, "checkpointing": checkpointing}
        if dtype is not None:
            options["dtype"] = dtype
        return cast(Reward, import_module(self.module).build(source, choices=choices, **options))

    def inspect(self, weights: str | Path | None, choices: Choices = OFFICIAL) -> WeightsReport:
        """Whether a call would find what it needs, file, header, every name and shape, without building.

        Seconds at most, and no allocation to speak of, also for towers of a billion parameters.  Raises RewardError.
        """
        source = self._source(weights)
        return cast(WeightsReport, import_module(self.module).inspect(source, choices=choices))

    def check_digests(self, weights: str | Path | None, sha256: Sequence[str]) -> None:
        """Raises RewardError unless every digest is that of a file the reward reads."""
        from rewards.weights import check_digests

        check_digests(self.inspect(weights).files, sha256)

    def _source(self, weights: str | Path | None) -> str | Path:
        if self.function:
            if weights:
                raise RewardError(
                    self.function, f"takes no weights, but was given {weights}", "load them in its module"
                )
            return self.function
        if not weights:
            raise RewardError(self.module, "needs weights", "name their file or folder")
        return weights


REWARDS = {
    "clip": Builder("rewards.clip"),
    "hpsv2": Builder("rewards.hpsv2"),
    "pickscore": Builder("rewards.pickscore"),
    "imagereward": Builder("rewards.imagereward"),
    "aesthetic": Builder("rewards.aesthetic", reads_prompts=False),
}
TOWERS = ("clip", "hpsv2", "pickscore")  # those whose features of images can be compared


def find(name: str) -> Builder:
    """A name of ``REWARDS``, or ``module:function`` -> what builds it.  Raises RewardError.

    The one place where names are resolved: ``find("clip")(file)``, ``find("my.module:score")(None)``.
    """
    if name in REWARDS:
        return REWARDS[name]
    if ":" in name:
        return Builder("rewards.user", function=name)
    raise RewardError(name, "is no reward", f"the rewards are {', '.join(REWARDS)}, and module:function for your own")
