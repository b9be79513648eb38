#!/usr/bin/env python
"""VideoX-Fun's training of Qwen-Image-Edit, by its own command lines:

    accelerate launch --mixed_precision=bf16 scripts/qwenimage/train_edit.py --pretrained_model_name_or_path=... ...

Flags become those of ``python -m train_t2i train --method sft`` (train_t2i/entries.py), which runs in this process; ``--dry-run``
prints them.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also where the toolkit is not installed

from train_t2i import redact
from train_t2i.__main__ import main
from train_t2i.entries import translate
from train_t2i.errors import told


def run() -> int:
    arguments, lines = translate(sys.argv[1:], os.environ)
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(line, file=sys.stderr)
    return main(["train", *arguments])


if __name__ == "__main__":
    redact.guard_streams()
    sys.exit(told(run))
