"""The VAE's training: clips of shapes, of known and of unknown kinds, cut small at first; then the decoder alone.

Shapes: `B C T H W` = batch, channels, frames, rows, columns, -1 to 1; `t h w` the same in latent space.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.func import functional_call

from ...config import VAEConfig
from ...numerics import widen
from ...vae import Decoder, Encoder
from ...vae.attention import TemporalAttention
from ...vae.blocks import ResBlock
from ...weights.writer import write_safetensors
from ..draws import generator
from ..loop import Loss
from . import scenes
from .files import bfloat16_outputs

FIRST_LOGVAR = -4.0
OPPOSITE = 4.0
MEAN_SILU = 0.207  # of a standard normal value


@dataclass(frozen=True)
class Crops:
    """What one micro-batch shows: `clips` pieces of `frames` frames, `size` rows and columns each."""

    clips: int
    frames: int
    size: int


@dataclass(frozen=True)
class VAERecipe:
    """`crops` by the share of the steps at which they begin. `strange` of the clips show what has no name."""

    crops: tuple[tuple[float, Crops], ...] = (
        (0.0, Crops(4, 7, 32)),
        (0.4, Crops(2, 13, 40)),
        (0.7, Crops(1, 19, 64)),
    )
    strange: float = 0.3
    kl: float = 5e-4
    gradient: float = 0.5
    bfloat16: bool = True

    def at(self, index: int, steps: int) -> Crops:
        return [crops for begins, crops in self.crops if index >= begins * steps][-1]


class VAE(nn.Module):
    """Both halves, as one file has them."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)


class Matrices(nn.Module):
    """A network's parameters with every kernel as a matrix, in its memory: so that Muon takes convolutions too."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = {"": network}  # not a submodule: its parameters would be there twice
        for name, parameter in network.named_parameters():
            flat = nn.Parameter(parameter.detach().flatten(1) if parameter.ndim > 2 else parameter.detach())
            self.register_parameter(name.replace(".", "/"), flat)

    def call(self, part: str, *inputs: Any) -> Any:
        """The network's `part`, with these parameters in place."""
        network = self.network[""].get_submodule(part)
        shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        mine = {name: self.get_parameter(f"{part}.{name}".replace(".", "/")).view(shapes[name]) for name in shapes}
        return functional_call(network, mine, inputs)


def new_vae(config: VAEConfig, seed: int) -> VAE:
    """With first weights that keep the size of what goes through, drawn from a seed.

    The fast waves of the encoder's features begin at zero, or they would drown the colours; residual branches begin at
    nothing, and the posterior begins narrow.
    """
    vae, chance = VAE(config), generator(seed, "vae")
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=chance)
                if module.bias is not None:
                    module.bias.zero_()
        for module in vae.modules():
            if isinstance(module, ResBlock):
                module.stack[-1].weight.zero_()  # pyright: ignore[reportCallIssue]
            if isinstance(module, TemporalAttention):
                module.out.weight.zero_()
        encoder = vae.encoder
        encoder.layers[0].weight[:, 3:] = 0  # pyright: ignore[reportIndexIssue]
        _harmless(encoder.output_norm, encoder.layers[-1].layers[0].bias)  # pyright: ignore
        encoder.output_proj.weight[config.latent_channels :] = FIRST_LOGVAR / (
            MEAN_SILU * encoder.output_proj.in_features
        )
    return vae


def _harmless(norm: nn.GroupNorm, bias: torch.Tensor) -> None:
    """Makes the norm nearly nothing at first: with groups of which the layer before it has strong opposite biases.

    A norm over a whole picture takes flat colours away unless there is something constant to tell them by.
    """
    signs = torch.ones_like(bias)
    signs[1::2] = -1
    bias.copy_(OPPOSITE * signs)
    norm.weight.fill_(OPPOSITE)
    norm.bias.copy_(-OPPOSITE * signs)


def strange_frames(chance: np.random.Generator, frames: int, size: int) -> np.ndarray:
    """Shapes and colours without a name on a ground that fades: `T H W 3`, 0 to 1."""
    side = np.linspace(-1, 1, size, dtype=np.float32)
    turn = chance.uniform(0, 2 * math.pi)
    fade = 0.5 + 0.5 * chance.uniform(0, 1) * (math.cos(turn) * side[:, None] + math.sin(turn) * side[None, :]) / 1.42
    first, second = chance.uniform(0, 1, (2, 3)).astype(np.float32)
    picture = np.broadcast_to(first + (second - first) * fade[..., None], (frames, size, size, 3))
    for _ in range(chance.integers(1, 4)):
        lobes, depth, tilt = chance.integers(2, 7), chance.uniform(0, 0.5), chance.uniform(0, 2 * math.pi)
        speed, start = chance.uniform(-1.6, 1.6, 2), chance.uniform(-0.4, 0.4, 2) * size
        spin, growth = chance.uniform(-0.15, 0.15), chance.uniform(-0.3, 0.3)
        frame = np.arange(frames, dtype=np.float32)[:, None, None]
        x = np.arange(size, dtype=np.float32)[None, None, :] - size / 2 - start[0] - speed[0] * (frame - frames / 2)
        y = np.arange(size, dtype=np.float32)[None, :, None] - size / 2 - start[1] - speed[1] * (frame - frames / 2)
        radius = np.maximum(chance.uniform(5, 16) + growth * frame, 2)
        wave = 1 + depth * np.cos(lobes * np.arctan2(y, x) + tilt + spin * frame)
        inside = np.clip(0.5 - (np.hypot(x, y) - radius * wave) * 0.8, 0, 1)[..., None]
        colour = chance.uniform(0, 1, 3).astype(np.float32)
        picture = picture + inside * (colour - picture)
    return picture.astype(np.float32)


def clips_for(seed: int, index: int, crops: Crops, strange: float) -> torch.Tensor:
    """Micro-batch `index`: `B 3 T H W`."""
    chance = np.random.default_rng((seed, 1, index))
    every, pieces = scenes.scenes(held_out=False), []
    for _ in range(crops.clips):
        if chance.random() < strange:
            pieces.append(strange_frames(chance, crops.frames, crops.size))
            continue
        scene = every[chance.integers(len(every))]
        begin = chance.integers(scenes.MOST_FRAMES - crops.frames + 1)
        whole = scenes.render(scene, scenes.placed(scene, chance), scenes.MOST_FRAMES).numpy()
        top, left = chance.integers(0, scenes.SIZE - crops.size + 1, 2)
        pieces.append(whole[begin : begin + crops.frames, top : top + crops.size, left : left + crops.size])
    return rearrange(torch.from_numpy(np.stack(pieces)), "B T H W C -> B C T H W") * 2 - 1


def picture_loss(seen: torch.Tensor, wanted: torch.Tensor, gradient: float) -> torch.Tensor:
    """Absolute and squared differences, and those of neighbouring pixels and frames: edges count more than areas."""
    off = widen(seen) - wanted
    loss = off.abs().mean() + off.square().mean()
    for axis in (2, 3, 4):
        if off.shape[axis] > 1:
            loss = loss + gradient * off.diff(dim=axis).abs().mean()
    return loss


@dataclass
class VAETask:
    """A `loop.Task`: both halves, or with `decoder_alone` the decoder on an encoder that stays as it is."""

    vae: VAE
    recipe: VAERecipe
    steps: int
    seed: int
    decoder_alone: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    trained: Matrices = field(init=False)

    def __post_init__(self) -> None:
        self.trained = Matrices(self.vae)
        for name, parameter in self.trained.named_parameters():
            parameter.requires_grad_(not (self.decoder_alone and name.startswith("encoder")))

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {"recipe": asdict(self.recipe), "seed": self.seed, "decoder_alone": self.decoder_alone}

    def loss(self, index: int) -> Loss:
        device = next(self.trained.parameters()).device
        wanted = clips_for(self.seed, index, self.recipe.at(index, self.steps), self.recipe.strange).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
            with torch.set_grad_enabled(not self.decoder_alone):
                posterior = self.trained.call("encoder", wanted)
            mean, logvar = widen(posterior.mean), widen(posterior.logvar).clamp(-12, 4)
            noise = torch.randn(mean.shape, generator=generator(self.seed, "posterior", index)).to(device)
            seen = self.trained.call("decoder", mean + torch.exp(0.5 * logvar) * noise)
        value = picture_loss(seen, wanted, self.recipe.gradient)
        psnr = -10 * math.log10(((widen(seen) - wanted).detach() / 2).square().mean().item())
        if self.decoder_alone:
            return Loss(value, metrics={"psnr": psnr})
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return Loss(value + self.recipe.kl * kl, metrics={"psnr": psnr, "kl": kl.item()})

    def write(self, folder: Path, name: str) -> Path:
        path = folder / f"{name}.safetensors"
        write_safetensors(path, bfloat16_outputs(self.vae.state_dict()), self.metadata)
        return path

    def sample(self, folder: Path, name: str) -> Path | None:
        return None
