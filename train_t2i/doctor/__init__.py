"""``python -m train_t2i doctor``: what is here, what a chosen recipe would need, and one line a problem.

    python -m train_t2i doctor                     the installation, the machine, the weights
    python -m train_t2i doctor --config row.yaml   and a recipe: the flags of ``plan`` and ``train``, a launcher's row for one

It works where the installation does not: what a look needs is imported in it, and a look that fails is a problem.
No model is loaded, nothing is changed.  Exit code: 0 without a problem, else 2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from train_t2i import redact
from train_t2i.doctor import installation
from train_t2i.doctor.findings import Finding, page
from train_t2i.errors import EXIT_DONE, EXIT_USER, UserError


def main(arguments: Sequence[str]) -> int:
    try:
        from train_t2i.doctor.examination import examine, parse
    except ImportError as error:  # no flag can be read
        missing = Finding("toolkit", f"cannot be imported ({error})", installation.ANEW)
        return tell([*installation.versions(), missing], None)
    config, settings = parse(arguments)
    return tell(examine(config, settings), config.out)


def tell(found: Sequence[Finding], out: str | None) -> int:
    """Print, and write where it is asked for; the exit code."""
    problems = [finding for finding in found if finding.way_out]
    print(redact.clean("\n".join(page(found))))
    if out is not None:
        told = {"problems": len(problems), "findings": [finding.as_dict() for finding in found]}
        try:
            Path(out).write_text(redact.clean(json.dumps(told, indent=1, ensure_ascii=False)) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})", "choose another file") from None
    return EXIT_USER if problems else EXIT_DONE
