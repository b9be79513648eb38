"""``python -m rewards VERB``: score pictures, inspect weights, measure what rewards cost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rewards import REWARDS, Choices, RewardError, find

WRONG_USE = 2  # exit status of a mistake of the user's


def choice(name: str) -> bool:
    """'true' or 'false' of a flag."""
    if name not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{name} is neither true nor false")
    return name == "true"


def parser() -> argparse.ArgumentParser:
    """The command line, whole."""
    whole = argparse.ArgumentParser(prog="python -m rewards", description=__doc__)
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB")
    weights = argparse.ArgumentParser(add_help=False)
    weights.add_argument("--reward", required=True, help=f"{', '.join(REWARDS)}, or module:function of your own")
    weights.add_argument("--weights", help="its weights, a file or a folder; none for a function of your own")
    weights.add_argument("--sha256", nargs="+", default=[], metavar="HEX", help="digests that its files must have")
    official = "; the reward's official way where left out"
    weights.add_argument("--antialias", type=choice, metavar="true|false", help=f"antialias what is shrunk{official}")
    weights.add_argument(
        "--resize-mode", choices=("squash", "longest", "shortest"), help=f"squash, pad or crop{official}"
    )
    weights.add_argument("--quick-gelu", type=choice, metavar="true|false", help=f"the towers' activation{official}")
    weights.add_argument(
        "--logit-scale", type=choice, metavar="true|false", help=f"multiply by exp(logit_scale){official}"
    )
    verbs.add_parser("inspect", parents=[weights], help="look at weights without building anything")
    score = verbs.add_parser("score", parents=[weights], help="score pictures against prompts")
    score.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    score.add_argument("--prompts", help="UTF-8 text, the prompt of each picture on its line")
    score.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")
    score.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the layers")
    score.add_argument("--batch-size", type=int, default=8, help="pictures of one size that are scored together")
    score.add_argument("--out", help="write the JSON to this file rather than print it")
    cost = verbs.add_parser("benchmark", help="milliseconds and megabytes of every reward, on random weights")
    cost.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS), metavar="NAME")
    cost.add_argument("--published", action="store_true", help="the published shapes (gigabytes) instead of small ones")
    cost.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")
    cost.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the layers")
    cost.add_argument("--batch-size", type=int, default=4, help="pictures a call")
    cost.add_argument("--micro-batch", type=int, default=1, help="pictures at a time in the second row of each reward")
    cost.add_argument("--resolution", type=int, default=256, help="side of the pictures in px")
    return whole


def run(given: argparse.Namespace) -> None:
    """One verb.  Raises RewardError."""
    if given.verb == "benchmark":
        from rewards.benchmark import table

        for line in table(given):
            print(line, flush=True)
        return
    choices = Choices(given.antialias, given.resize_mode, given.quick_gelu, given.logit_scale)
    if given.verb == "score":
        from rewards.score import score

        text = score(given, choices)
        if given.out is None:
            print(text)
        return
    builder = find(given.reward)
    print(builder.inspect(given.weights, choices))
    if given.sha256:
        builder.check_digests(given.weights, given.sha256)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0, or 2 after one line that says what was wrong."""
    given = parser().parse_args(arguments)
    sys.path.insert(0, str(Path.cwd()))  # for module:function, also where this is called by another name
    try:
        run(given)
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE
    return 0


if __name__ == "__main__":
    sys.exit(main())
