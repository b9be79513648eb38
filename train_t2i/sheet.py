"""Sample sheets: the same prompts and the same noise every time, the teacher beside the student.

``samples/step N/``: ``grid.png`` (top row student, bottom row teacher where the method has one) and one PNG an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from train_t2i.config import Settings
from train_t2i.engine import Engine
from train_t2i.families.base import Cond
from train_t2i.image_data import Rows
from train_t2i.log import RunLog, grid_image, to_pil
from train_t2i.methods import Method
from train_t2i.networks import Networks
from train_t2i.prompts import load_prompts
from train_t2i.randomness import Draw
from train_t2i.sampling import many_step

SHEET_SEED = 20_240_607  # apart from every training stream


def sheet_prompts(settings: Settings, data: Rows) -> list[str]:
    """The prompts of the sample images: the first of their own file, or of the training data."""
    run = settings.run
    if run.sample_prompts:
        return load_prompts(run.sample_prompts)[: run.batch_size_test]
    return [data.prompt(row) for row in range(min(run.batch_size_test, len(data)))] if run.sample_steps else []


@dataclass
class SampleSheet:
    """Draws on the main process; touches no generator that training uses."""

    method: Method | None = None
    networks: Networks | None = None
    folder: Path = Path()
    log: RunLog | None = None
    prompts: Sequence[str] = ()
    shape: tuple[int, int, int] = (0, 0, 0)
    num_steps: int = 0
    cfg: float = 1.0
    negative: str = ""
    writes: bool = True  # where calls need all processes, the others draw along
    _teacher: Tensor | None = field(default=None, repr=False)

    @staticmethod
    def none() -> SampleSheet:
        return SampleSheet()

    @staticmethod
    def build(
        settings: Settings,
        method: Method,
        networks: Networks,
        root: Path,
        log: RunLog,
        prompts: Sequence[str],
        engine: Engine,
    ) -> SampleSheet:
        cfg = settings.run
        if not cfg.sample_steps or not (engine.is_main or engine.calls_need_all):
            return SampleSheet()
        shape = method.setting.latent_shape  # type: ignore[attr-defined]
        negative = getattr(settings.method, "negative_prompt", "")
        return SampleSheet(
            method, networks, root / "samples", log, prompts, shape, cfg.teacher_num_steps, cfg.teacher_cfg, negative,
            engine.is_main,
        )  # fmt: skip

    @torch.no_grad()
    def draw(self, step: int) -> None:
        if self.method is None or self.networks is None or self.log is None:
            return
        family = self.networks.family
        cond = family.encode(self.prompts, self.negative)
        draw = Draw(SHEET_SEED, 0, range(len(self.prompts)), cond.tokens.device)
        noise = draw.normal("noise", self.shape)
        student = self.method.sample(cond, noise, lambda i: draw.normal(f"renoise/{i}", self.shape))
        rows = [family.decode(student)]
        if "teacher" in self.method.uses:
            if self._teacher is None:
                self._teacher = self._teacher_images(cond, noise)
            rows.append(self._teacher)
        if self.writes:
            self._write(rows, step)

    def _teacher_images(self, cond: Cond, noise: Tensor) -> Tensor:
        networks = self.networks
        assert networks is not None

        def x0_at(x: Tensor, t: Tensor) -> Tensor:
            return networks.x0("teacher", x, t, cond, cfg=self.cfg)

        return networks.family.decode(many_step(x0_at, networks.family.path, self.num_steps, noise))

    def _write(self, rows: list[Tensor], step: int) -> None:
        assert self.log is not None
        folder = self.folder / f"step {step}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(rows[0]):
            to_pil(image).save(folder / f"student_{i:03d}.png")
        grid = grid_image(rows)
        grid.save(folder / "grid.png")
        (folder / "prompts.txt").write_text("\n".join(self.prompts) + "\n", encoding="utf-8")
        self.log.images(grid)
