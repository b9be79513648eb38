"""PickScore: which of several images for a prompt people would pick.

Score: the cosine times the exponential of the weights' own logit scale (about 100); 20 to 23 for images of common
models, up to 24 after reinforcement learning.  Training code divides by 20 to 26, or leaves the scale out:
``Choices(logit_scale=False)``.  A GELU ViT-H-14 in transformers' CLIPModel layout.  Its processor brings the shortest side
to 224 px and cuts out the middle.  Prompts go through open_clip's tokenizer, whose ids are those of the processor's, except
that it also repairs mojibake and HTML entities.

Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", arXiv:2305.01569;
weights: the folder, or model.safetensors, of yuvalkirstain/PickScore_v1.
"""

from __future__ import annotations

from rewards import tower

SPEC = tower.TowerSpec(quick_gelu=False, resize_mode="shortest", logit_scale=True, centre="floor")
FILES = tower.CosineFiles("pickscore", SPEC)
build, inspect = FILES.build, FILES.inspect
