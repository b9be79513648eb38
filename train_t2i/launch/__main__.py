"""``python -m train_t2i.launch``: the same as the verb, on a Python that has no packages."""

import sys

from train_t2i import redact
from train_t2i.errors import told
from train_t2i.launch import main

if __name__ == "__main__":
    redact.guard_streams()
    sys.exit(told(lambda: main(sys.argv[1:])))
