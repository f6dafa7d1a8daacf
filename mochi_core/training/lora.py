"""The LoRA that is being trained: factors in float32 beside frozen layers of any format, and the file they become.

The layers are left as they are: a hook on each adds its branch, so quantised, streamed and checkpointed layers are all
the same to it. (PEFT puts layers of its own in their places, which moves the weights' names and knows no packed ones.)

Shapes: `R` rank, `I` input features, `O` output features.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import TrainingError
from ..weights.files import TYPE_NAMES
from ..weights.lora_file import linear_shapes, read_lora
from ..weights.writer import Output, write_safetensors
from .draws import generator

# Which of a block's layers belong to which group of options; the first two are what the reference trains.
GROUPS = {
    "qkv": re.compile(r"blocks\.\d+\.attn\.qkv_[xy]"),
    "out": re.compile(r"blocks\.\d+\.attn\.proj_[xy]"),
    "feed_forward": re.compile(r"blocks\.\d+\.mlp_[xy]\.w[12]"),
    "modulation": re.compile(r"blocks\.\d+\.mod_[xy]"),
}


@dataclass(frozen=True)
class Rank:
    """The LoRA of a group of layers: its rank (0 for none), and alpha, which over the rank is its strength."""

    rank: int = 0
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        alpha = self.rank if self.alpha is None else self.alpha
        if self.rank < 0 or not math.isfinite(alpha) or (self.rank and alpha <= 0) or not 0 <= self.dropout < 1:
            raise TrainingError(
                f"A LoRA has rank {self.rank}, alpha {alpha}, dropout {self.dropout}",
                "the rank is 0 or more, alpha above 0, dropout from 0 to below 1",
                "Use rank 16, alpha 16, dropout 0",
            )


@dataclass(frozen=True)
class LoraOptions:
    """Which layers are trained. With `rslora` the strength is alpha over the rank's root (Kalajdzievski 2023)."""

    qkv: Rank = Rank(16)
    out: Rank = Rank(16)
    feed_forward: Rank = Rank(0)
    modulation: Rank = Rank(0)
    rslora: bool = False
    # A LoRA file to go on from; None begins with one that changes nothing.
    start: str | None = None

    def of(self, layer: str) -> Rank | None:
        """What a layer gets, None for one that is not trained."""
        for group, pattern in GROUPS.items():
            if pattern.fullmatch(layer):
                rank: Rank = getattr(self, group)
                return rank if rank.rank else None
        return None

    def scale(self, rank: Rank) -> float:
        alpha = rank.rank if rank.alpha is None else rank.alpha
        return alpha / (math.sqrt(rank.rank) if self.rslora else rank.rank)


class TrainableLora(nn.Module):
    """Low-rank changes of a network's layers, `scale * up @ down`; `up` begins at zero, `down` as PEFT begins it.

    Raises `TrainingError` when the options leave nothing to train.
    """

    def __init__(self, network: nn.Module, options: LoraOptions, seed: int = 0, device: torch.device | str = "cpu"):
        super().__init__()
        self.options = options
        self.ranks: dict[str, Rank] = {}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        # What draws the dropout of one micro-batch; the same again when a layer is run once more for its gradient.
        self.dropped: int | None = None
        self.seed = seed
        for name, (outputs, inputs) in linear_shapes(network).items():
            rank = options.of(name)
            if rank is None:
                continue
            self.ranks[name] = rank
            bound = 1 / math.sqrt(inputs)
            drawn = torch.rand(rank.rank, inputs, generator=generator(seed, "lora", name)) * 2 - 1
            self.down[_key(name)] = nn.Parameter((drawn * bound).to(device))
            self.up[_key(name)] = nn.Parameter(torch.zeros(outputs, rank.rank, device=device))
        if not self.ranks:
            raise TrainingError(
                "The LoRA has no layer", f"one of {', '.join(GROUPS)} must have a rank", "Give qkv a rank of 16"
            )
        if options.start is not None:
            self._start_from(options.start, network)

    @torch.no_grad()
    def _start_from(self, path: str, network: nn.Module) -> None:
        held = read_lora(path, network).layers
        ranks = {name: change.rank for name, change in held.items()}
        wanted = {name: rank.rank for name, rank in self.ranks.items()}
        if ranks != wanted or any(change.magnitude is not None for change in held.values()):
            different = sorted(set(ranks.items()) ^ set(wanted.items()))
            raise TrainingError(
                f"{path} does not have the layers and ranks of this training: {dict(different[:2]) or 'it is a DoRA'}",
                "a LoRA goes on with those that it has",
                "Set the ranks to those of the file, or begin without it",
            )
        for name, change in held.items():
            self.down[_key(name)].copy_(change.down)
            self.up[_key(name)].copy_(change.up.float() * (change.scale / self.options.scale(self.ranks[name])))

    @contextmanager
    def attached(self, network: nn.Module) -> Iterator[None]:
        """The network with these changes, as long as the block runs."""
        handles = []
        try:
            for name in self.ranks:
                layer: nn.Module = network.get_submodule(name)
                handles.append(layer.register_forward_hook(partial(self._add, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        rank, key = self.ranks[name], _key(name)
        inner = F.linear(self._with_dropout(name, rank, x), self.down[key].to(x)) * self.options.scale(rank)
        return output + F.linear(inner, self.up[key].to(x))

    def _with_dropout(self, name: str, rank: Rank, x: torch.Tensor) -> torch.Tensor:
        if not rank.dropout or self.dropped is None:
            return x
        # A whole tensor of chance, drawn on the CPU, would be slow on a GPU: only its seed is.
        drawn = generator(self.seed, "dropout", name, self.dropped)
        own = torch.Generator(x.device).manual_seed(drawn.initial_seed())
        kept = torch.rand(x.shape, generator=own, device=x.device) >= rank.dropout
        return x * kept / (1 - rank.dropout)

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes the LoRA as genmo's trainer names it, which our loader and ComfyUI's own read too.

        The strength is in `up`, and alpha equals the rank: who ignores alpha, as ComfyUI does with this layout, is
        right nevertheless.
        """
        outputs = []
        for name, rank in self.ranks.items():
            down = self.down[_key(name)].detach().float().cpu()
            up = self.up[_key(name)].detach().float().cpu() * self.options.scale(rank)
            for suffix, tensor in (("lora_A", down), ("lora_B", up)):
                kind = TYPE_NAMES[tensor.dtype]
                outputs.append(Output(f"{name}.{suffix}", kind, tuple(tensor.shape), partial(_same, tensor)))
        write_safetensors(path, outputs, {**metadata, **self._genmo()})

    def _genmo(self) -> dict[str, str]:
        """What genmo's files say of ranks, with the strength already in the factors.

        They can speak of two groups. A file that says nothing is everywhere taken as trained with alpha = rank.
        """
        if self.options.feed_forward.rank or self.options.modulation.rank:
            return {}
        said: dict[str, Any] = {}
        for kind, rank in (("qkv_proj", self.options.qkv), ("out_proj", self.options.out)):
            if rank.rank:
                said |= {f"{kind}_lora_rank": rank.rank, f"{kind}_lora_alpha": rank.rank}
                said |= {f"{kind}_lora_dropout": rank.dropout}
        return {"kwargs": json.dumps(said)}


def _key(layer: str) -> str:
    """A layer's name as a parameter's, in which torch wants no dots."""
    return layer.replace(".", "-")


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
