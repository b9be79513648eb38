"""Training methods by name."""

from typing import Any

from train_t2i.methods.arcflow import ArcFlow
from train_t2i.methods.base import Batch, Method, RewardTerm, Setting
from train_t2i.methods.direct import Direct
from train_t2i.methods.dmdr import DMDR
from train_t2i.methods.sft import SFT

METHODS: dict[str, Any] = {"dmdr": DMDR, "direct": Direct, "arcflow": ArcFlow, "sft": SFT}

__all__ = ["METHODS", "Batch", "Method", "RewardTerm", "Setting"]
