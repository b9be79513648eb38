"""CLIP: how well an image fits its prompt.

Score: the raw cosine, in [-1, 1]; about 0.2 to 0.45 for images of their prompts with DFN5B-CLIP-ViT-H-14, the tower of
the DMDR recipe.  It is trained with QuickGELU (x * sigmoid(1.702 x)); with GELU it still runs, and scores wrongly.
It squashes any image to its square input.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020;
Fang et al. 2023, "Data Filtering Networks", arXiv:2309.17425.
"""

from __future__ import annotations

from rewards import tower

SPEC = tower.TowerSpec(quick_gelu=True, resize_mode="squash")
FILES = tower.CosineFiles("clip", SPEC)
build, inspect = FILES.build, FILES.inspect
