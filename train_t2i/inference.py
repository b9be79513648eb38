"""Stock schedulers that visit a student's own times: what an exported pipeline samples with.

SDXL, re-noised: ``LCMScheduler`` (arXiv 2310.04378, algorithm 3); with ``original_inference_steps=N`` its levels are the
training grid's (999, 749, 499, 249 at four), and one step at level 399 is a schedule of the first 400 betas with one step.
SDXL, deterministic: ``DDIMScheduler`` with trailing levels.  Rectified flow: ``FlowMatchEulerDiscreteScheduler``, whose
``stochastic_sampling`` re-noises.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from train_t2i.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from train_t2i.schedule import Path
    from train_t2i.student import ImageModel

FIRST_LEVEL = 0.001  # where FlowMatchEulerDiscreteScheduler's own times end before they are shifted


def student_scheduler(model: ImageModel) -> Any:
    """The scheduler whose own times are the student's.  Raises UserError where no config can say them."""
    from train_t2i.schedule import RectifiedFlow

    run, path = model.settings.run, model.family.path
    if isinstance(path, RectifiedFlow):
        evenly_spaced = model.family.evenly_spaced  # type: ignore[attr-defined]
        return flow_scheduler(path.grid(run.sample_num_steps), path.shift, run.sample_type, evenly_spaced=evenly_spaced)
    return epsilon_scheduler(model)


def flow_scheduler(grid: Tensor, shift: float, sample_type: str, *, evenly_spaced: bool) -> Any:
    """For a (N + 1,) grid of ``shift``.  ``evenly_spaced``: the pipeline gives 1, ..., 1/N, which are then shifted alone.

    SD3's pipeline leaves the times to the scheduler, which takes 1, ..., 0.001 and stretches them to end where it is told.
    Shifts are Moebius maps, and so are their pieces: with v = i / (N - 1), our 1 - t is proportional to v / (1 - c v),
    c = (1 - 1/s)(1 - 1/N); the scheduler's with a shift r to v / (1 - d v), d = 0.999 (1 - 1/r).  They agree for d = c.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    stochastic = {"stochastic_sampling": sample_type == "sde"}
    num_steps = len(grid) - 1
    if evenly_spaced or num_steps == 1:
        return FlowMatchEulerDiscreteScheduler(shift=shift, **stochastic)
    c = (1 - 1 / shift) * (1 - 1 / num_steps)
    mu = -math.log(1 - c / (1 - FIRST_LEVEL))
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=mu, max_shift=mu, time_shift_type="exponential",
        shift_terminal=float(grid[-2]), **stochastic,
    )  # fmt: skip


def epsilon_scheduler(model: ImageModel) -> Any:
    """SDXL's."""
    from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler

    path: Any = model.family.path
    run = model.settings.run
    num_steps = run.sample_num_steps
    base = DDPMScheduler.from_config(model.family.pipe.scheduler.config)  # type: ignore[attr-defined]
    grid = path.levels(path.grid(num_steps)[:-1]).tolist()
    known = ("beta_start", "beta_end", "beta_schedule", "prediction_type")
    shared = {name: base.config[name] for name in known} | {"clip_sample": False}
    whole = {name: base.config[name] for name in ("num_train_timesteps", "trained_betas", "rescale_betas_zero_snr")}
    if num_steps == 1:
        betas = base.betas[: grid[0] + 1].double().tolist()
        made: Any = LCMScheduler(
            **shared, num_train_timesteps=len(betas), trained_betas=betas, original_inference_steps=1
        )
    elif run.sample_type == "ode":
        made = DDIMScheduler(**shared, **whole, timestep_spacing="trailing", set_alpha_to_one=True)
    else:
        made = LCMScheduler(**shared, **whole, original_inference_steps=num_steps)
    made.set_timesteps(num_steps)
    if made.timesteps.tolist() != grid:
        raise UserError(
            f"the student's times {grid} cannot be said in a scheduler's config (it would take "
            f"{made.timesteps.tolist()})",
            f"--shift {run.shift} has no pipeline: sample with python -m train_t2i sample",
        )
    return made


def noise_levels(path: Path, grid: Tensor) -> tuple[list[float], list[float]]:
    """A (N + 1,) grid as samplers are told it: the network's N times in thousandths, and N + 1 sigmas, the last 0.

    Sigma is noise over signal where the signal is kept whole (arXiv 2206.00364, table 1): t itself for rectified flow.
    """
    from train_t2i.schedule import EpsilonVP

    times = grid[:-1]
    if not isinstance(path, EpsilonVP):
        return (1000 * times.double()).tolist(), grid.double().tolist()
    levels = path.levels(times)
    abar = path.alphas_cumprod[levels].double()
    return levels.tolist(), [*((1 - abar) / abar).sqrt().tolist(), 0.0]


def many_step_scheduler(model: ImageModel) -> Any:
    """A fine-tuned teacher's: deterministic, from pure noise."""
    from diffusers import DDIMScheduler

    from train_t2i.schedule import RectifiedFlow

    own = model.family.pipe.scheduler  # type: ignore[attr-defined]
    if isinstance(model.family.path, RectifiedFlow):
        return own
    return DDIMScheduler.from_config(own.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
