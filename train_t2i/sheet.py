"""Sample sheets: the same prompts and the same noise every time, the teacher beside the student.

``samples/step N/``: ``grid.png`` (an edit's sources, the student, the teacher where the method has one) and one PNG an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from train_t2i.config import EDIT_FAMILIES, Settings
from train_t2i.engine import Engine
from train_t2i.families.base import Cond, Source, alike
from train_t2i.feed import asked_of, sources_of
from train_t2i.image_data import Rows
from train_t2i.log import RunLog, grid_image, to_pil
from train_t2i.methods import Method
from train_t2i.networks import Networks
from train_t2i.randomness import Draw
from train_t2i.sampling import many_step

SHEET_SEED = 20_240_607  # apart from every training stream


def sheet_rows(settings: Settings, data: Rows) -> tuple[list[str], list[list[Source]]]:
    """Prompts and sources of the sample images: the first of their own file, or of the training data."""
    run = settings.run
    if run.sample_prompts:
        return asked_of(settings, run.sample_prompts, run.batch_size_test)
    rows = range(min(run.batch_size_test, len(data)) if run.sample_steps else 0)
    sources = sources_of(data, rows) if run.model_family in EDIT_FAMILIES else []
    return [data.prompt(row) for row in rows], sources


@dataclass
class SampleSheet:
    """Draws on the main process; touches no generator that training uses."""

    method: Method | None = None
    networks: Networks | None = None
    folder: Path = Path()
    log: RunLog | None = None
    prompts: Sequence[str] = ()
    sources: Sequence[Sequence[Source]] = ()
    shape: tuple[int, int, int] = (0, 0, 0)
    num_steps: int = 0
    cfg: float = 1.0
    negative: str = ""
    writes: bool = True  # where calls need all processes, the others draw along
    _teacher: Tensor | None = field(default=None, repr=False)
    _asked: list[tuple[list[int], Cond]] = field(default_factory=list, repr=False)

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
        asked: tuple[Sequence[str], Sequence[Sequence[Source]]],
        engine: Engine,
    ) -> SampleSheet:
        cfg = settings.run
        if not cfg.sample_steps or not (engine.is_main or engine.calls_need_all):
            return SampleSheet()
        shape = method.setting.latent_shape  # type: ignore[attr-defined]
        negative = getattr(settings.method, "negative_prompt", "")
        return SampleSheet(
            method, networks, root / "samples", log, *asked, shape, cfg.teacher_num_steps, cfg.teacher_cfg, negative,
            engine.is_main,
        )  # fmt: skip

    @property
    def draws(self) -> bool:
        """Whether this process makes images."""
        return self.method is not None

    @property
    def device(self) -> torch.device:
        return self.method.setting.device  # type: ignore[union-attr]

    @torch.no_grad()
    def student(self, seed: int) -> Tensor:
        """(N, 3, H, W) in [0, 1]: the student's image of each prompt, with the noise of ``seed``; the sheet's is 0."""
        return self._images(self._student, seed)

    def students(self, num_seeds: int, drawn: Tensor | None) -> Iterator[Tensor]:
        """``student`` of seed 0, 1, ..., one after the other, on the processes that make images.

        ``drawn``: that of seed 0, where it has just been made.
        """
        for seed in range(num_seeds if self.draws else 0):
            yield drawn if drawn is not None and seed == 0 else self.student(seed)

    @torch.no_grad()
    def draw(self, step: int) -> Tensor | None:
        """Make the sheet; the student's images, on the processes that make any."""
        if self.method is None or self.networks is None or self.log is None:
            return None
        student = self.student(0)
        rows = [*self._sources(), student]
        if "teacher" in self.method.uses:
            if self._teacher is None:
                self._teacher = self._images(self._of_teacher)
            rows.append(self._teacher)
        if self.writes:
            self._write(rows, step)
        return student

    def _images(self, sample: Callable[[Cond, Draw], Tensor], seed: int = 0) -> Tensor:
        """(N, 3, H, W): what ``sample`` makes of each prompt, rows of equal sources at once."""
        assert self.networks is not None
        made: dict[int, Tensor] = {}
        for group, cond in self._encoded():
            images = self.networks.family.decode(sample(cond, Draw(SHEET_SEED, seed, group, cond.tokens.device)))
            made.update(zip(group, images, strict=True))
        return torch.stack([made[row] for row in range(len(self.prompts))])

    def _encoded(self) -> list[tuple[list[int], Cond]]:
        """The rows of equal sources and their conditioning: encoded once a run, since prompts and encoders stay."""
        assert self.networks is not None
        if not self._asked:
            encode = self.networks.family.encode
            for group in alike(self.sources, len(self.prompts)):
                sources = [self.sources[row] for row in group] if self.sources else ()
                self._asked.append((group, encode([self.prompts[row] for row in group], self.negative, sources)))
        return self._asked

    def _student(self, cond: Cond, draw: Draw) -> Tensor:
        assert self.method is not None
        noise = draw.normal("noise", self.shape)
        return self.method.sample(cond, noise, lambda i: draw.normal(f"renoise/{i}", self.shape))

    def _of_teacher(self, cond: Cond, draw: Draw) -> Tensor:
        networks = self.networks
        assert networks is not None

        def x0_at(x: Tensor, t: Tensor) -> Tensor:
            return networks.x0("teacher", x, t, cond, cfg=self.cfg)

        return many_step(x0_at, networks.family.path, self.num_steps, draw.normal("noise", self.shape))

    def _sources(self) -> list[Tensor]:
        """Rows of the sheet above the student's: each prompt's first, second, ... source; white where there is none."""
        assert self.networks is not None
        size = [side * self.networks.family.vae_factor for side in self.shape[1:]]
        white = torch.ones(3, *size)

        def shown(sources: Sequence[Source], i: int) -> Tensor:
            if i >= len(sources):
                return white
            pixels = sources[i].pixels[None].float() / 255
            return F.interpolate(pixels, size, mode="bilinear", antialias=True)[0]

        most = max(map(len, self.sources), default=0)
        return [torch.stack([shown(sources, i) for sources in self.sources]) for i in range(most)]

    def _write(self, rows: list[Tensor], step: int) -> None:
        assert self.log is not None
        folder = self.folder / f"step {step}"
        folder.mkdir(parents=True, exist_ok=True)
        num_sources = max(map(len, self.sources), default=0)
        for i, image in enumerate(rows[num_sources]):
            to_pil(image).save(folder / f"student_{i:03d}.png")
        grid = grid_image(rows)
        grid.save(folder / "grid.png")
        (folder / "prompts.txt").write_text("\n".join(self.prompts) + "\n", encoding="utf-8")
        self.log.images(grid)
