"""What each method reads beside what every run does: one dataclass a method, rules as in config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train_t2i.flags import flag

TIME_KINDS = ("uniform", "beta", "logit_normal")
POLICIES = ("momentum", "gmflow")
GUARDS = ("off", "warn", "scale", "stop")
WEIGHTINGS = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")


@dataclass(frozen=True)
class DMDRConfig:
    """Distribution matching distillation with rewards."""

    learning_rate_gui: float = flag(1e-7, "learning rate of the guidance network", low=0)
    lora_scale_f: float = flag(2.0, "scale of the guidance adapter in the fake score", low=0)
    lora_scale_r: float = flag(0.5, "its starting scale in the real score; falls to 0 over --dynamic-step", low=0)
    cfg_r: float = flag(7.0, "guidance of the real score, drawn within 0.5 of this; 1: none", low=1)
    cfg_f: float = flag(1.0, "guidance of the fake score, likewise; 1: none", low=1)
    negative_prompt: str = flag("", "text that guidance moves away from; empty: the model's own default")
    ratio_update: int = flag(5, "guidance updates a generator update", low=1)
    reuse_rollout: bool = flag(
        False,
        "the guidance network learns the estimate that the generator's update makes, updated first, as in DMD2: a network "
        "call less a step",
    )
    student_input: str = flag(
        "renoised",
        "what the student is given below its first time: its own finished image noised anew, as published, or path: the state "
        "that its deterministic sampling has there (--sample-type ode)",
        choices=("renoised", "path"),
    )
    dmd_weight: float = flag(1.0, "weight of the distribution matching loss; 0: rewards alone", low=0)
    cold_start_iter: int = flag(3000, "generator steps before rewards begin", low=0)
    dynamic_step: int = flag(0, "steps over which the dynamic strategies fade; 0: off", low=0)
    s_type_gen: str = flag("uniform", "how the student's level is drawn", choices=TIME_KINDS)
    s_type_gui: str = flag("uniform", "how the time of the scores is drawn", choices=TIME_KINDS)
    gen_a: float = flag(1.0, "first parameter of --s-type-gen (beta: alpha, logit_normal: mean)")
    gen_b: float = flag(1.0, "second parameter (beta: beta, logit_normal: deviation)", above=0)
    gui_a: float = flag(4.0, "first parameter of --s-type-gui")
    gui_b: float = flag(1.5, "second parameter", above=0)
    clip_reward_model: str | None = flag(
        None, "CLIP reward: weights file (DFN5B ViT-H-14) or tower folder; on iff given"
    )
    hpsv2_reward_model: str | None = flag(None, "HPSv2.1 reward: weights file or tower folder; on iff given")
    extra_rewards: str = flag(
        "",
        "more rewards, WEIGHT*NAME=PATH with commas between (pickscore, imagereward, aesthetic, ...), or of your own, "
        "WEIGHT*MODULE:FUNCTION of (images (B,3,H,W) in [0,1], prompts) -> (B,) with a gradient",
    )
    extra_reward_margin: float | None = flag(
        None, "--extra-rewards above this are not pushed further; not given: no end"
    )
    reward_clip_weight: float = flag(0.3, "weight of the CLIP loss", low=0)
    reward_hps_weight: float = flag(0.3, "weight of the HPS loss", low=0)
    reward_margin: float = flag(0.7, "CLIP and HPS above this are not pushed further")
    reward_batch_size: int = flag(
        0,
        "images that are decoded and scored at a time: the memory of so many, the gradient of all; 0: all",
        resume="free",
        low=0,
    )
    magic_prompt: str = flag("Realistic photo", "words put before the prompt for HPS alone; empty: none")
    srpo: bool = flag(
        False, "HPS scores one wording of the prompt relative to another instead (semantic-relative, SRPO)"
    )
    srpo_k: float = flag(0.1, "what is left of the plain score: (1 + k) cos(positive) - cos(negative)", low=0)
    srpo_positive: str = flag("Natural-lighting,Detailed,Realistic", "comma list of words to move towards")
    srpo_negative: str = flag("Painting,CG Render,Oil", "comma list of words to move away from")
    monitor_rewards: str = flag(
        "",
        "rewards that are in no loss, NAME=PATH with commas between, read off the sample prompts at every --sample-steps; "
        "the first is a tower (clip, hpsv2), whose features say how diverse the images are",
    )
    monitor_seeds: int = flag(4, "images of each sample prompt that are read", low=2)
    monitor_reference: str | None = flag(
        None, "table of real images (columns image, prompt), of which the images read should cover a share: recall"
    )
    reward_guard: str = flag(
        "off",
        "when a reward has risen and a monitored one or diversity has fallen: warn, scale the reward weights down, or stop",
        resume="warn",
        choices=GUARDS,
    )
    guard_reward_drop: float = flag(
        0.25, "fall of a monitored reward, in deviations of its scores when rewards began", resume="warn", low=0
    )
    guard_diversity_drop: float = flag(0.2, "fall of diversity, as a share of its best", resume="warn", low=0, below=1)
    guard_factor: float = flag(
        0.5, "what --reward-guard scale multiplies all reward weights by, each time", resume="warn", low=0, below=1
    )


@dataclass(frozen=True)
class DirectConfig:
    """Regression of the student's whole sampler on the teacher's results, from the same seeded noise."""

    step_checkpointing: bool = flag(
        False,
        "keep only the latents between the student's steps and make each step's calls anew in backward",
        resume="warn",
    )
    backprop_steps: int = flag(0, "steps that the gradient goes back through, from the last; 0: all", low=0)
    huber_delta: float = flag(0.0, "differences above this count linearly (Huber); 0: mean squared error", low=0)
    states_weight: float = flag(
        0.0,
        "weight of the latents between the steps, where the data has the teacher's (pairs --states)",
        low=0,
    )
    feature_model: str | None = flag(
        None, "CLIP tower (weights file or folder) whose view of the images is compared too"
    )
    feature_weight: float = flag(0.1, "weight of 1 - cosine of its features", low=0)
    max_row_steps: int = flag(
        0, "take each row's num_inference_steps, up to this many; 0: --sample-num-steps for all", low=0, high=500
    )
    max_pixels: int = flag(
        0, "images of their own sizes, of at most so many pixels each, batched by size; 0: all of --resolution", low=0
    )


@dataclass(frozen=True)
class SFTConfig:
    """Denoising on image-text pairs."""

    caption_dropout: float = flag(0.1, "share of rows trained without their caption", low=0, high=1)
    weighting_scheme: str = flag(
        "none",
        "how times are drawn (logit_normal, mode) or losses weighted (sigma_sqrt, cosmap), as in diffusers' SD3 training",
        choices=WEIGHTINGS,
    )
    logit_mean: float = flag(0.0, "of --weighting-scheme logit_normal: above 0 means less noise")
    logit_std: float = flag(1.0, "of --weighting-scheme logit_normal", above=0)
    mode_scale: float = flag(1.29, "of --weighting-scheme mode: how much the middle is preferred", low=0)
    uniform_sampling: bool = flag(False, "spread the times of a batch evenly over all noise levels")
    trainable_modules: str = flag(
        "", "comma list of parts of parameters' names: only those are trained; empty or a dot: all"
    )
    trainable_modules_low_learning_rate: str = flag("", "likewise, trained at half of the learning rate")
    ema_decay: float = flag(
        0.0, "of a moving average of the weights, in fp32, which samples and exports; 0: none", low=0, below=1
    )
    cache_rows: bool = flag(False, "keep every row's latent and conditioning in memory after its first use")
    vae_mini_batch: int = flag(0, "images that the VAE encodes at once; 0: all of a micro-batch", resume="warn", low=0)
    enable_bucket: bool = flag(
        False, "images keep about their own proportions, at the area of --resolution, and are batched by size"
    )
    random_hw_adapt: bool = flag(
        False, "with --enable-bucket: one batch of ten has smaller sides, down to 512 pixels, drawn by --seed"
    )


@dataclass(frozen=True)
class ArcFlowConfig:
    """The student says a velocity for every time of a segment, and imitates the teacher along the way that it leads."""

    policy: str = flag(
        "momentum", "the velocities: momentum (ArcFlow's closed form), gmflow (pi-Flow's mixture)", choices=POLICIES
    )
    num_components: int = flag(
        16, "velocities that are mixed, each pixel in its own way; 1: an Euler step", low=1, high=64
    )
    num_queries: int = flag(4, "times at which a segment is compared with the teacher", low=1, high=64)
    window_substeps: float = flag(
        3.0, "time over which the student's mean is matched, in 128ths of the whole; 0: a point", low=0, high=128
    )
    gate_dropout: float = flag(0.1, "share of velocities left out of the way that leads to the queries", low=0, below=1)
    mixing_steps: int = flag(
        1000, "steps over which the way goes from the teacher's to the student's own; 0: its own at once", low=0
    )
    distill_cfg: float = flag(4.0, "guidance of the teacher that is imitated; 1: none", low=1)
    negative_prompt: str = flag("", "text that guidance moves away from; empty: the model's own default")
    momentum_rate: float = flag(0.1, "learning rate of the momenta, in that of the generator", above=0)
    ema_start: int = flag(100, "steps before the moving average of the weights begins", low=0)
    ema_power: float = flag(7.0, "its power (Karras): the share of the last tenth of all steps grows with it", low=0)
    temperature: float = flag(
        1.0, "of gmflow's mixture in all sampling steps but the last (pi-Flow: 0.3 of 4 steps)", above=0, high=1
    )


METHOD_CONFIGS: dict[str, type[Any]] = {
    "dmdr": DMDRConfig,
    "direct": DirectConfig,
    "arcflow": ArcFlowConfig,
    "sft": SFTConfig,
}
