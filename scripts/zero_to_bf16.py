#!/usr/bin/env python
"""A checkpoint of any backend as a bf16 folder that stock diffusers loads: ``python -m train_t2i export --dtype bf16``.

python scripts/zero_to_bf16.py OUTPUT_DIR/checkpoint-N FOLDER --max_shard_size 80GB --safe_serialization
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where the toolkit is not installed

from train_t2i import redact
from train_t2i.__main__ import main
from train_t2i.entries import bf16_export
from train_t2i.errors import told


def run() -> int:
    arguments, lines = bf16_export(sys.argv[1:])
    for line in lines:
        print(line, file=sys.stderr)
    return main(["export", *arguments])


if __name__ == "__main__":
    redact.guard_streams()
    sys.exit(told(run))
