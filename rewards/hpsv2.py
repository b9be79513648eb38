"""HPSv2 (v2.1, or v2.0): how much people would like an image for its prompt.

Score: the raw cosine, in [-1, 1]; about 0.25 for SD 1.4, 0.3 for SDXL and up to 0.35 after reinforcement learning
(papers print it times 100).  v2.0 is the same architecture with other weights, and on another scale: the two are not to
be compared, and its package's ``score`` uses v2.0 where nothing is said.  A GELU ViT-H-14.  Its own preprocessing brings the longest side to 224 px and pads with
black to a square before normalisation; for square images that is the squash that training code often uses instead.

The package resizes a tensor and says nothing of antialiasing, which torchvision does since 0.17 and did not before;
``Choices(antialias=False)`` is the older way.  DiffSynth-Studio's metric of the same name multiplies by the exponential
of the logit scale: ``Choices(logit_scale=True)``.

Wu et al. 2023, "Human Preference Score v2", arXiv:2306.09341; weights: HPS_v2.1_compressed.pt, HPS_v2_compressed.pt.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from rewards import tower
from rewards.base import OFFICIAL, Choices, WeightsReport

VERSION = re.compile(r"HPS_v2([._][01])?(?![0-9])", re.IGNORECASE)
SPEC = tower.TowerSpec(quick_gelu=False, resize_mode="longest")
FILES = tower.CosineFiles("hpsv2", SPEC)
build = FILES.build


def inspect(weights: str | Path, choices: Choices = OFFICIAL) -> WeightsReport:
    """Whether ``build`` would find what it needs, without building.  Raises RewardError."""
    report = FILES.inspect(weights, choices)
    return replace(report, choices=report.choices | {"version": version(report.path)})


def version(path: str) -> str:
    """What a file's name says: nothing inside the file tells v2.0 from v2.1."""
    found = VERSION.search(Path(path).name)
    if found is None:
        return "v2.0 or v2.1 (not told by the name)"
    return "v2.1" if (found[1] or "").endswith("1") else "v2.0"
