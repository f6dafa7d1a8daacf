"""What the checkpoint can do, measured: videos of held-out captions, told by `classifier`, and the VAE alone.

Shapes: `B C T H W` = batch, channels, latent frames, latent rows, latent columns; frames are `T H W 3`, 0 to 1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from einops import rearrange

from ...pipeline import MochiPipeline, decode
from ...sampling.guidance import Guidance, constant
from ...sampling.samplers import draw_noise, euler
from ...sampling.schedule import linear_quadratic
from ...shapes import VideoSize
from ...vae import Decoder, Encoder
from ...vae.decoder import to_frames
from . import scenes
from .classifier import classify

ASPECTS = tuple(part.name for part in fields(scenes.Scene))
AT_ONCE = 12
SEED = 1234


@dataclass(frozen=True)
class Asked:
    """A caption, what it means, and the seed of its video."""

    caption: str
    scene: scenes.Scene
    seed: int


@dataclass(frozen=True)
class Settings:
    """How videos are sampled."""

    frames: int = scenes.FRAMES
    steps: int = 30
    cfg: float = 4.0


def held_out_captions(count: int, seed: int = SEED) -> list[Asked]:
    """Scenes that no training clip shows, each at most once, in every way of saying it."""
    chance = np.random.default_rng((seed, 5))
    every = scenes.scenes(held_out=True)
    places = chance.permutation(len(every))[:count]
    return [Asked(every[place].caption(chance), every[place], seed + at) for at, place in enumerate(places)]


@torch.inference_mode()
def videos(pipeline: MochiPipeline, asked: Sequence[Asked], settings: Settings) -> list[torch.Tensor]:
    """The video of each caption, as `pipeline` makes it, several at once."""
    size, channels = VideoSize(scenes.SIZE, scenes.SIZE, settings.frames).latent, pipeline.dit.config.latent_channels
    schedule, made = linear_quadratic(settings.steps), []
    negative = pipeline.text_encoder([""])
    for start in range(0, len(asked), AT_ONCE):
        some = asked[start : start + AT_ONCE]
        positive = pipeline.text_encoder([one.caption for one in some])
        noise = torch.cat([draw_noise(size, channels, one.seed) for one in some])
        guidance = Guidance(pipeline.predict, positive, negative, constant(settings.cfg, settings.steps))
        latents = pipeline.statistics.to_vae_space(euler(guidance, noise, schedule))
        made += list(torch.cat(list(decode(pipeline.decoder, latents)), dim=1))
    return made


def shares_right(wanted: Sequence[scenes.Scene], told: Sequence[scenes.Scene]) -> dict[str, float]:
    """How often each aspect, and all of them, are right."""
    right = np.array([[getattr(w, name) == getattr(t, name) for name in ASPECTS] for w, t in zip(wanted, told)])
    return {**{name: float(right[:, at].mean()) for at, name in enumerate(ASPECTS)}, "all": float(right.all(1).mean())}


def generation(
    pipeline: MochiPipeline, asked: Sequence[Asked], settings: Settings = Settings()
) -> tuple[dict[str, float], list[scenes.Scene]]:
    """The shares that are right, and what each video was told to show."""
    told = [classify(video) for video in videos(pipeline, asked, settings)]
    return shares_right([one.scene for one in asked], told), told


@torch.inference_mode()
def reconstruction(
    encoder: Encoder,
    decoder: Decoder,
    count: int,
    reserved: bool = False,
    seed: int = SEED,
    frames: int = scenes.FRAMES,
) -> Mapping[str, float]:
    """Of clips through the VAE: the PSNR in decibels, and the shares that the classifier still reads right."""
    chance = np.random.default_rng((seed, 6))
    every = [s for s in scenes.every_scene(held_out=True) if s.reserved == reserved]
    shown = [every[place] for place in chance.integers(len(every), size=count)]
    errors, told = [], []
    for start in range(0, count, AT_ONCE):
        some = shown[start : start + AT_ONCE]
        clips = torch.stack([scenes.render(scene, scenes.placed(scene, chance), frames) for scene in some])
        posterior = encoder(rearrange(clips * 2 - 1, "B T H W C -> B C T H W"))
        seen = to_frames(decoder(posterior.mean))
        errors += (seen - clips).square().flatten(1).mean(1).tolist()
        told += [classify(clip) for clip in seen]
    psnr = float(np.mean([-10 * math.log10(max(error, 1e-10)) for error in errors]))
    return {"psnr": psnr, **shares_right(shown, told)}


def confusions(asked: Sequence[Asked], told: Sequence[scenes.Scene]) -> list[str]:
    """What went wrong, for whoever wants to know."""
    wrong: Callable[[Asked, scenes.Scene], list[str]] = lambda one, seen: [  # noqa: E731
        f"{name} {getattr(one.scene, name)} seen as {getattr(seen, name)}"
        for name in ASPECTS
        if getattr(one.scene, name) != getattr(seen, name)
    ]
    return [f"{one.caption}: {', '.join(wrong(one, seen))}" for one, seen in zip(asked, told) if wrong(one, seen)]
