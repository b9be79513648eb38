"""Errors that are told to a person in one line, and the exit codes that tell them apart.  Any room may import this file."""

import sys
from collections.abc import Callable

from train_t2i import redact

EXIT_DONE = 0
EXIT_USER = 2  # the user's mistake, corrupt input included
EXIT_NON_FINITE = 4
EXIT_DISK = 5
EXIT_HANG = 6  # this process stood still
EXIT_LOCKED = 7
EXIT_LOST = 8  # another process of this run ended or cannot be reached
EXIT_GAMED = 9  # stopped by --reward-guard stop, saved
EXIT_PREEMPTED = 75  # stopped by a signal, saved, can be resumed


class UserError(Exception):
    """Something a person can put right: one line that names the file, line or flag, and the way out.

    The programs print ``error: MESSAGE`` and ``hint: HINT`` and leave with ``exit_code``, without a traceback.
    Secrets are taken out: it may hold what a library or a server said.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = EXIT_USER) -> None:
        super().__init__(message)
        self.message = redact.clean(" ".join(str(message).split()))
        self.hint = redact.clean(" ".join(hint.split()))
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}" + (f" ({self.hint})" if self.hint else "")


def told(program: Callable[[], int]) -> int:
    """The exit code of a program; a UserError is printed."""
    try:
        return program()
    except UserError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
