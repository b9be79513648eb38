"""What the rectified-flow transformers (SD3, FLUX.1, Qwen-Image) share: their times, patches, VAE and loading.

Shapes: B rows; C H W latent; x_t (B, 16, H, W); packed (B, H/2 * W/2, 64), channel order (c, dy, dx).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Any, ClassVar, Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from train_t2i.errors import UserError
from train_t2i.families.base import Cond, FamilyOptions, Source, classifier_free
from train_t2i.families.loading import load_autoencoder, load_pipeline, load_tiny, told
from train_t2i.schedule import RectifiedFlow, even_times, shift_time

PATCH = 2  # latent cells a token, along one side
TIME_EMBEDDING = tuple(rf"time_text_embed\.timestep_embedder\.linear_{i}" for i in (1, 2))


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4 C): one token for each patch of 2 x 2 cells."""
    rows, channels, height, width = x.shape
    patches = x.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(rows, (height // PATCH) * (width // PATCH), channels * PATCH * PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """``pack`` undone; ``height`` and ``width`` in latent cells."""
    rows, _, width_of_token = tokens.shape
    channels = width_of_token // PATCH**2
    patches = tokens.reshape(rows, height // PATCH, width // PATCH, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(rows, channels, height, width)


def told_time(t: Tensor, like: Tensor) -> Tensor:
    """(B,) in [0, 1]: the time as the pipelines tell it: in thousands, rounded to the format of its text and latents.

    bf16 knows 904 and 908 and nothing between: a student that learnt at 905.66 would be sampled at a time that it never saw.
    What is mixed, stepped and weighted uses the fp32 time.
    """
    return (t.float() * 1000).to(like.dtype) / 1000


class FlowFamily:
    """A transformer on rectified flow; a subclass says how it is told its prompt and called.

    ``pipe`` holds text encoders, tokenizers, VAE and scheduler; ``config`` is the transformer's; ``load_net(dtype)`` makes
    one.  ``tiny`` is an ``AutoencoderTiny`` whose decoder serves rewards.
    """

    Pipeline: ClassVar[Any]
    Transformer: ClassVar[Any]
    Autoencoder: ClassVar[Any]
    denoiser_name = "transformer"
    encoder_names: ClassVar[tuple[str, ...]]
    block_names: ClassVar[tuple[str, ...]]
    default_text_length: ClassVar[int]
    max_text_length: ClassVar[int]
    evenly_spaced: ClassVar[bool] = True  # its pipeline gives the scheduler 1, ..., 1/N; else the scheduler's own
    latent_channels = 16

    def __init__(
        self, pipe: Any, config: dict[str, Any], load_net: Callable[[torch.dtype], nn.Module], options: FamilyOptions
    ) -> None:
        self.device = torch.device("cpu")
        self.pipe, self.config, self.options, self._load_net = pipe, config, options, load_net
        self.vae, pipe.vae = pipe.vae, None  # one VAE is kept, ours
        self.tiny = load_tiny(options.tiny_vae, self.latent_channels)
        for part in self._parts():
            part.requires_grad_(False).eval()
        self.vae_factor = self._vae_factor()
        self.size_multiple = self.vae_factor * PATCH
        self.text_length = options.text_length or self.default_text_length
        self.path = RectifiedFlow(self._student_shift(), self._dense_times)
        self._empty: tuple[str, torch.device, Cond] | None = None
        if options.checkpoint_decoder:
            self._checkpoint_decoder()

    @classmethod
    def from_pretrained(cls, model: str, options: FamilyOptions) -> Self:
        """From a hub id or a pipeline folder.  Raises UserError."""
        if FilePath(model).is_file():
            raise UserError(f"--pretrained-model {model}: is a file", "give a hub id or a diffusers pipeline folder")
        left_out = ("transformer", *(() if options.encoders else cls.encoder_names))
        pipe = load_pipeline(cls.Pipeline, model, options.dtype, left_out)
        if options.vae:
            pipe.vae = load_autoencoder(cls.Autoencoder, options.vae, "--vae", cls.latent_channels, options.dtype)
        with told(model, "--pretrained-model"):
            config = dict(cls.Transformer.load_config(model, subfolder="transformer"))

        def load_net(dtype: torch.dtype) -> nn.Module:
            with told(model, "--pretrained-model"):
                return cls.Transformer.from_pretrained(model, subfolder="transformer", dtype=dtype)

        return cls(pipe, config, load_net, options)

    # -- what a subclass says ------------------------------------------------------------------------------------

    @property
    def lora_targets(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def policy_targets(self) -> tuple[str, ...]:
        return ()

    @property
    def max_side_px(self) -> int | None:
        return None

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        raise NotImplementedError

    def _encode(self, prompts: list[str]) -> Cond:
        """Conditioning without a negative, as the pipeline's own ``encode_prompt`` makes it."""
        raise NotImplementedError

    # -- text ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], negative: str | None = None, sources: Sequence[Sequence[Source]] = ()
    ) -> Cond:
        """A negative is the encoding of its text, also of the empty one; it is made once and seen by all rows."""
        if not self.options.encoders:
            raise RuntimeError("the text encoders were not loaded")
        cond = self.complete(self._encode(list(prompts)))
        if negative is None:
            return cond
        if self._empty is None or self._empty[:2] != (negative, self.device):
            self._empty = negative, self.device, self._encode([negative])
        return replace(cond, negative=self._empty[2].expand(len(prompts)))

    def complete(self, cond: Cond) -> Cond:
        return cond

    def guide(self, positive: Tensor, negative: Tensor, weight: float | Tensor) -> Tensor:
        return classifier_free(positive, negative, weight)

    # -- times ---------------------------------------------------------------------------------------------------

    def _scheduler_config(self) -> dict[str, Any]:
        return dict(FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config).config)

    def _mu(self, config: dict[str, Any], size_px: tuple[int, int]) -> float:
        """Logarithm of the resolution-dependent shift (SD3, arXiv 2403.03206, section 5.3.2, as FLUX.1 fitted it)."""
        height, width = size_px
        tokens = (height // self.size_multiple) * (width // self.size_multiple)
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(tokens, *(config[name] for name in names))

    def own_shift(self) -> float:
        """The shift that the model's scheduler gives images of this size."""
        config = self._scheduler_config()
        if not config["use_dynamic_shifting"]:
            return float(config["shift"])
        mu = self._mu(config, self.options.size_px)
        return float(torch.tensor(mu).exp()) if config["time_shift_type"] == "exponential" else mu

    def _student_shift(self) -> float:
        return self.own_shift() if self.options.shift is None else self.options.shift

    def training_time(self, rank: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """(B,) shares of all noise levels that are lower -> (B,) times of images of (H, W) latent cells.

        Shifted as the run says; the model's own shift is its scheduler's, a table of as many times as it was trained with.
        """
        if self.options.shift is not None:
            return shift_time(rank, self.options.shift)
        height, width = latent_size
        table = self._own_times(height * self.vae_factor, width * self.vae_factor).to(rank.device, non_blocking=True)
        return table[((1 - rank) * len(table)).long().clamp(max=len(table) - 1)]

    @lru_cache(maxsize=256)  # noqa: B019 - a family lives as long as its run
    def _own_times(self, height_px: int, width_px: int) -> Tensor:
        """(1000,) fp32, descending from 1."""
        return self._dense_times(self._scheduler_config()["num_train_timesteps"], (height_px, width_px))[:-1]

    def _dense_times(self, num_steps: int, size_px: tuple[int, int] | None = None) -> Tensor:
        """(num_steps + 1,) fp32: the times of the model's own pipeline, from its own scheduler."""
        if num_steps == 1:  # Qwen-Image's cannot stretch a single time
            return even_times(1)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        told_times = {"sigmas": even_times(num_steps)[:-1].tolist()} if self.evenly_spaced else {}
        size_px = size_px or self.options.size_px
        mu = {"mu": self._mu(dict(scheduler.config), size_px)} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(num_steps, **told_times, **mu)
        return scheduler.sigmas.float()

    # -- modules -------------------------------------------------------------------------------------------------

    def _parts(self) -> list[nn.Module]:
        encoders = [getattr(self.pipe, name) for name in self.encoder_names if name.startswith("text_encoder")]
        return [part for part in (*encoders, self.vae, self.tiny) if part is not None]

    def load(self, dtype: torch.dtype) -> nn.Module:
        return self._load_net(dtype).requires_grad_(False).train(False)

    def lora_state(self, state: dict[str, Tensor], net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        return self.Pipeline.lora_state_dict(state), None

    def to(self, device: torch.device) -> Self:
        self.device = device
        for part in self._parts():
            part.to(device)
        return self

    def pipeline(self, net: Any, scheduler: Any, latent_size: tuple[int, int]) -> Any:
        return self.Pipeline(**self.pipe.components | {"vae": self.vae, "transformer": net, "scheduler": scheduler})

    def call_options(self, cfg: float) -> dict[str, Any]:
        return {"guidance_scale": cfg, "max_sequence_length": self.text_length}

    # -- images: AutoencoderKL; Qwen-Image has its own -----------------------------------------------------------

    def _vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _checkpoint_decoder(self) -> None:
        for decoder in filter(None, (self.vae, self.tiny)):
            decoder.enable_gradient_checkpointing()

    def decode(self, z: Tensor, *, fast: bool = False) -> Tensor:
        coder = self.tiny if fast and self.tiny is not None else self.vae
        config = coder.config
        z = z.float() / config.scaling_factor + (config.shift_factor or 0.0)
        images = coder.decode(z.to(coder.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        config = self.vae.config
        mean = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist.mode().float()
        return (mean - (config.shift_factor or 0.0)) * config.scaling_factor
