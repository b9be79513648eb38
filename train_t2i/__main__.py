"""``python -m train_t2i VERB``: one file a verb, imported only when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from train_t2i import redact
from train_t2i.errors import EXIT_DONE, EXIT_USER, UserError, told

VERBS = {
    "train": "distil or fine-tune a model (--method dmdr, ode, sft)",
    "sample": "images from a run, a step of it, or the teacher",
    "evaluate": "score models on the same prompts: rewards, distances, diversity, paired differences, a page to vote on",
    "votes": "win rates from the votes of that page",
    "cache": "encode every prompt once, so that training needs no text encoder (--prompt-cache)",
    "pairs": "write (noise, prompt, teacher latent) pairs for --method direct",
    "export": "a run's generator for diffusers, ComfyUI and kohya's tools: pipeline, weights or LoRA",
    "gallery": "one HTML page of a run's images: teacher and student by step, prompt search, scores",
    "report": "one HTML page and plots from runs",
    "plan": "what a run will take on each device, without one (--model, --num-processes, and the flags of train)",
    "doctor": "what is here, what a recipe would need, and one line a problem (the flags of plan and train, or none)",
    "benchmark": "seconds and memory of a step, layout by layout",
    "launch": "one training script on several machines over SSH (scripts/multi_node/multi.sh)",
    "fetch": "download weights named in checkpoints/manifest.toml",
}


def usage() -> str:
    return "usage: python -m train_t2i VERB [flags]\n\n" + "\n".join(
        f"  {verb:9} {text}" for verb, text in VERBS.items()
    )


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return EXIT_DONE if arguments else EXIT_USER
    verb, rest = arguments[0], arguments[1:]
    return told(lambda: run(verb, rest))


def run(verb: str, arguments: Sequence[str]) -> int:
    if verb not in VERBS:
        raise UserError(f"{verb}: unknown verb", f"one of {', '.join(VERBS)}")
    if verb == "train":  # help, mistakes and --dry-run are answered before torch loads
        from train_t2i import cli

        if cli.rehearse(arguments):
            return EXIT_DONE
    return import_module(f"train_t2i.{verb}").main(arguments)


if __name__ == "__main__":
    redact.guard_streams()
    sys.exit(main(sys.argv[1:]))
