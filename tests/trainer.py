"""``train`` with the flags of a tiny run, inside this process."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def flags_of(root: Path, sdxl: Path, tiny_vae: Path, prompts: Path, images: Path, pairs: Path) -> dict[str, str]:
    """The flags of a tiny run: of all methods, of each, and of rewards."""
    return {
        "all": f"--pretrained-model {sdxl} --output-dir {root} --resolution 32 --mixed-precision no "
        "--batch-size 2 --batch-size-test 2 --learning-rate-gen 1e-3 --sample-steps 0 "
        "--checkpoint-steps 0 --max-train-steps 2",
        "dmdr": f"--method dmdr --data-path-train {prompts} --lora-rank 2 --learning-rate-gui 1e-3 --ratio-update 2 "
        "--cold-start-iter 1000 --cfg-r 3 --teacher-num-steps 2",
        "direct": f"--method direct --data-path-train {pairs}",
        "arcflow": f"--method arcflow --data-path-train {prompts}",
        "sft": f"--method sft --data-path-train {images} --teacher-num-steps 2 --num-workers 0",
        "rewards": f"--tiny-vae {tiny_vae}",
    }


@dataclass
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@dataclass
class Trainer:
    """``train`` with the flags of a tiny run; later flags win."""

    root: Path
    flags: dict[str, str]
    say: Callable[[], tuple[str, str]]

    def arguments(self, name: str, more: str = "", method: str = "dmdr") -> list[str]:
        rewards = self.flags["rewards"] if "-reward-model" in more else ""
        return shlex.split(f"train {self.flags['all']} {self.flags[method]} {rewards} --exp-name {name} {more}")

    def ends(self, name: str, more: str = "", method: str = "dmdr") -> Ended:
        """Run to its end, whatever that is."""
        from train_t2i.__main__ import main

        self.say()
        code = main(self.arguments(name, more, method))
        return Ended(code, *self.say())

    def run(self, name: str, more: str = "", method: str = "dmdr") -> Path:
        """Run to a good end; the run's folder."""
        ended = self.ends(name, more, method)
        assert ended.code == 0, ended.err
        return self.root / name


_LOADED: dict[tuple, Any] = {}
_SPARE: dict[int, list[Any]] = {}  # id of what was loaded -> copies of it, made before they are needed


def remember_models(replace: Callable[[Any, str, Any], object] = setattr) -> None:
    """Runs get copies of models that were read from disk once: reading is half of a tiny run's time."""
    import diffusers

    from train_t2i.families import sdxl

    def remembered(name: str) -> Callable[..., Any]:
        load = getattr(sdxl, name)

        def loader(*arguments: Any) -> Any:
            key = (name, *arguments)
            if key not in _LOADED:
                _LOADED[key] = load(*arguments)
            kept = _LOADED[key]
            if not isinstance(kept, diffusers.DiffusionPipeline):
                return _copy(kept)
            parts = {part: kept.components[part] for part in kept.config if part in kept.components}
            return type(kept)(**{**parts, "vae": _copy(kept.vae)}, add_watermarker=False)

        return loader

    for name in ("_load_pipeline", "_load_unet"):
        replace(sdxl, name, remembered(name))


def _copy(kept: Any) -> Any:
    spare = _SPARE.get(id(kept))
    return spare.pop() if spare else copy.deepcopy(kept)


def make_copies(count: int) -> None:
    """Copies of all models for processes that will be forked: each takes its own from the memory it inherits."""
    for kept in _LOADED.values():
        model = getattr(kept, "vae", kept)
        _SPARE[id(model)] = [copy.deepcopy(model) for _ in range(count)]
