"""What a look finds: facts, and problems with a way out.  A look that fails is a problem too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rewards import RewardError
from train_t2i.errors import UserError

REPORT = "is it a mistake of the toolkit? report it with this line"


@dataclass(frozen=True)
class Finding:
    """One line: a fact, or a problem where there is a way out of it."""

    subject: str
    said: str
    way_out: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "problem": bool(self.way_out)}


def looked(subject: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What a look finds up to where it fails, and why it does."""
    try:
        yield from look()
    except UserError as error:
        yield Finding(subject, error.message, error.hint or REPORT)
    except RewardError as error:
        yield Finding(subject, f"{error.path}: {error.reason}", error.hint)
    except Exception as error:  # whatever a broken installation raises; the other looks go on
        yield Finding(subject, f"cannot be looked at ({first_line(error)})", REPORT)


def first_line(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0][:300]
    return f"{type(error).__name__}: {text}"


def page(found: Sequence[Finding]) -> list[str]:
    """Facts, then problems, one line each, then how many there are."""
    facts = [finding for finding in found if not finding.way_out]
    problems = [finding for finding in found if finding.way_out]
    width = max((len(finding.subject) for finding in facts), default=0)
    lines = [f"{finding.subject:{width}}  {finding.said}" for finding in facts]
    lines += [f"problem: {finding.subject}: {finding.said} ({finding.way_out})" for finding in problems]
    return [*lines, f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "no problem was found"]
