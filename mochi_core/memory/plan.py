"""What a budget of memory allows: which weights stay on the device, which are streamed, in what parts work is done.

print(plan(8e9, VideoSize(848, 480, 163)))

A plan is made before anything is loaded or moved. `placed` and `decode_context` do what it says. `text_plan`,
`encode_plan` and `decode_plan` are for one network.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import psutil
import torch
from torch import nn

from ..config import MOCHI_1, ModelConfig, TextConfig
from ..dit import AsymmDiT
from ..errors import MemoryBudgetError
from ..shapes import LatentSize, VideoSize
from ..text.t5 import empty_t5
from ..text.tokenizer import MAX_TOKENS
from ..vae import Decoder, Encoder
from ..vae.causal_conv import VALUES_AT_ONCE, KeptContext
from ..weights.quantized import unpacking_bytes
from .blocks import block_bytes, device_bytes, spread, streamed
from .borrowing import Check
from .frames import HostFrames
from .need import BUSY_TOKENS, FEWEST_TOKENS, TOKEN_STEP, dit_activations, t5_activations
from .turns import Traffic
from .vae_need import kept_frames_bytes, stagewise_encode_bytes, streaming_decode_bytes
from .waiting import Source

# What of a budget is left to kernels' workspaces and to what an allocator cannot fill.
KEPT_BACK = 1 / 16
# Into how many parts what a wide stage of the VAE does at once may be divided.
DIVISIONS = (1, 2, 4, 16)
# Of the host's free memory, how much streamed weights may pin. When they need more they are read from the file.
PINNED_SHARE = 0.6


@dataclass(frozen=True)
class Networks:
    """The three networks that a plan is for; on the meta device will do. `text` is transformers' T5 encoder."""

    text: Any
    dit: AsymmDiT
    decoder: Decoder

    @classmethod
    def released(cls, config: ModelConfig = MOCHI_1, dtype: torch.dtype = torch.bfloat16) -> "Networks":
        """Networks of the released sizes in `dtype`, without weights."""
        text: Any = empty_t5(config.text)
        made: dict[str, Any] = dict(dtype=dtype, device="meta")
        networks = text.to(dtype=dtype), AsymmDiT(config.dit, **made), Decoder(config.vae, **made)
        return cls(*(network.requires_grad_(False) for network in networks))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class NetworkPlan:
    """How one network of blocks runs: `resident` of them stay on the device, the others wait in `source`.

    `weights` and `activations` are bytes on the device at the peak; `streamed_bytes` wait on the host.
    """

    blocks: int
    resident: int
    source: Source
    weights: int
    activations: int
    streamed_bytes: int = 0
    tokens_at_once: int | None = None

    @property
    def peak(self) -> int:
        return self.weights + self.activations

    def __str__(self) -> str:
        words = (
            f"{self.resident} of {self.blocks} blocks resident" if self.weights else "weights where they were loaded"
        )
        if self.resident < self.blocks:
            words += f", {self.streamed_bytes / 1e9:.2f} GB streamed from "
            words += "host memory" if self.source == "pinned" else "the file"
        return words if self.tokens_at_once is None else f"{words}, {self.tokens_at_once} tokens at once"


@dataclass(frozen=True)
class DecodePlan:
    """How the decoder streams: bytes of kept frames that stay on the device, and at most on the host."""

    frames_on_device: int
    frames_on_host: int
    values_at_once: int
    weights: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.activations

    def __str__(self) -> str:
        words = "streaming"
        if self.frames_on_host:
            words += f", kept frames on the host ({self.frames_on_host / 1e9:.2f} GB at most)"
        if self.values_at_once < VALUES_AT_ONCE:
            words += f", in parts of {self.values_at_once / 2**20:.0f}M values"
        return words


@dataclass(frozen=True)
class EncodePlan:
    """How the encoder goes stage by stage: on so many values at once."""

    values_at_once: int
    weights: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class Plan:
    """What happens, one network after the other, and how much of the device each takes. Printable."""

    budget: int
    size: VideoSize
    device: torch.device
    text: NetworkPlan
    dit: NetworkPlan
    decode: DecodePlan

    @property
    def peak(self) -> int:
        """Bytes on the device at the worst moment."""
        return max(self.text.peak, self.dit.peak, self.decode.peak)

    def __str__(self) -> str:
        size = self.size
        lines = [f"{size.width} x {size.height}, {size.frames} frames, {self.budget / 1e9:.1f} GB on {self.device}"]
        for name, part in (("text", self.text), ("DiT", self.dit), ("decode", self.decode)):
            lines.append(f"  {name:<7} {part.peak / 1e9:6.2f} GB  {part}")
        return "\n".join(lines)


@dataclass(frozen=True)
class MemoryPolicy:
    """Where networks run, and in how much memory: bytes of the device, and bytes of the host that may be pinned.

    None is what is free when a video is begun; of the host, most of it.
    """

    device: torch.device | str
    budget: float | None = None
    host_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 <= self.budget < math.inf:
            raise MemoryBudgetError(f"The budget is {self.budget}", "it must be a number of bytes", "Say how many")

    @property
    def budget_now(self) -> float:
        """The bytes of the device that may be used."""
        return free_bytes(self.device) if self.budget is None else self.budget

    def plan(self, size: VideoSize, networks: Networks, *, batch: int = 1) -> Plan:
        """What `plan` says. Raises `MemoryBudgetError`, which says the least that will do."""
        return plan(self.budget_now, size, networks, self.device, batch=batch, host_bytes=self.host_bytes)


def free_bytes(device: torch.device | str) -> int:
    """How much of a device's memory nobody uses; of unified memory, how much torch would still take."""
    device = torch.device(device)
    if device.type == "cpu":
        return psutil.virtual_memory().available
    module: Any = torch.get_device_module(device)
    if device.type == "mps":
        return module.recommended_max_memory() - module.current_allocated_memory()
    module.empty_cache()
    return module.mem_get_info(device)[0]


def plan(
    budget: float,
    size: VideoSize,
    networks: Networks | None = None,
    device: torch.device | str = "cuda",
    *,
    batch: int = 1,
    text_tokens: int = MAX_TOKENS,
    host_bytes: int | None = None,
) -> Plan:
    """How `networks`, by default the released ones in bfloat16, make a video of `size` in `budget` bytes of `device`.

    They run one after the other. Work goes in chunks of tokens before weights are streamed, as that costs nothing; then
    as many blocks stay as fit. `batch` is 2 when both halves of guidance run together. Of streamed weights `host_bytes`
    may be pinned: by default, most of what is free. On a CPU, weights lie where they were loaded: mapped from their
    file, unless they were cast, and not counted.

    Raises `MemoryBudgetError`, which says the least that will do.
    """
    device, networks = torch.device(device), networks or Networks.released()
    dit = networks.dit
    dit_ways = _dit_ways(dit, size.latent, batch, text_tokens)
    parts: list[Any] = []
    too_little: list[MemoryBudgetError] = []
    for make in (
        partial(text_plan, networks.text, budget, device, host_bytes=host_bytes),
        partial(_blocks_plan, "the transformer", dit, dit.blocks, dit_ways, budget, device, host_bytes),
        partial(decode_plan, networks.decoder, size.latent, budget, device),
    ):
        try:
            parts.append(make())
        except MemoryBudgetError as error:
            too_little.append(error)
    if too_little:
        raise max(too_little, key=lambda error: error.least)
    return Plan(int(budget), size, device, *parts)


# How many tokens are worked on at once, None for all, and what that needs beside the weights; from the fastest way on.
Ways = list[tuple[int | None, int]]


def text_plan(network: Any, budget: float, device: torch.device | str, *, host_bytes: int | None = None) -> NetworkPlan:
    """How transformers' T5 encoder runs with `budget` bytes of `device`; the rest as for `plan`."""
    config = TextConfig(**{name: getattr(network.config, name) for name in TextConfig.__dataclass_fields__})
    dtype = dtype_of(network)
    ways: Ways = [(None, t5_activations(config, dtype=dtype) + unpacking_bytes(network, dtype))]
    blocks = network.encoder.block
    return _blocks_plan("the text encoder", network, blocks, ways, budget, torch.device(device), host_bytes)


def _dit_ways(network: AsymmDiT, size: LatentSize, batch: int, text_tokens: int) -> Ways:
    dtype = dtype_of(network)
    unpacking = unpacking_bytes(network, dtype)

    def need(at_once: int | None) -> int:
        own = dict(batch=batch, text_tokens=text_tokens, dtype=dtype, tokens_at_once=at_once)
        return dit_activations(network.config, size, **own) + unpacking  # pyright: ignore[reportArgumentType]

    whole = need(None)
    chunks = [(tokens, need(tokens)) for tokens in range(BUSY_TOKENS, FEWEST_TOKENS - 1, -TOKEN_STEP)]
    return [(None, whole), *(way for way in chunks if way[1] < whole)]


def _blocks_plan(
    name: str,
    network: nn.Module,
    blocks: Any,
    ways: Ways,
    budget: float,
    device: torch.device,
    host_bytes: int | None,
) -> NetworkPlan:
    """The first way that fits with as many resident blocks as fit beside it; chunks come before streaming."""
    count, available = len(blocks), usable(budget)
    held = cache(lambda resident: weight_bytes(network, blocks, resident, device))
    residents = range(count, -1, -1)
    for at_once, activations in ways:
        whole_first = at_once is None and ways[1:] and ways[1][0] == BUSY_TOKENS
        for resident in [count] if whole_first else residents:
            if held(resident) + activations <= available:
                source, waiting = waiting_place(blocks, resident, device, host_bytes)
                return NetworkPlan(count, resident, source, held(resident), activations, waiting, at_once)
    raise too_little_error(budget, min(map(held, residents)) + min(need for _, need in ways), name)


def waiting_place(
    blocks: Sequence[nn.Module], resident: int, device: torch.device, host_bytes: int | None = None
) -> tuple[Source, int]:
    """Where the weights of blocks that are not resident wait, and how many bytes they are; `host_bytes` as for `plan`.

    None on a CPU, where weights lie where they were loaded.
    """
    sizes, streamed_blocks = block_bytes(blocks), spread(len(blocks), resident)
    waiting = 0 if device.type == "cpu" else sum(sizes[index] for index in streamed_blocks)
    pinnable = psutil.virtual_memory().available * PINNED_SHARE if host_bytes is None else host_bytes
    return "pinned" if waiting <= pinnable else "file", waiting


def encode_plan(
    encoder: Encoder, size: LatentSize, budget: float, device: torch.device | str, *, batch: int = 1
) -> EncodePlan:
    """How the encoder makes latents of `size`, stage by stage, with `budget` bytes of `device`; as for `plan`."""
    dtype, needs = dtype_of(encoder), []
    weights = 0 if torch.device(device).type == "cpu" else sum(parameter.nbytes for parameter in encoder.parameters())
    for division in DIVISIONS:
        values = VALUES_AT_ONCE // division
        need = stagewise_encode_bytes(encoder.config, size, batch=batch, dtype=dtype, values_at_once=values)
        if weights + need <= usable(budget):
            return EncodePlan(values, weights, need)
        needs.append(need)
    video = size.video
    raise too_little_error(budget, weights + min(needs), f"the encoder for {video.width} x {video.height}")


def decode_plan(
    decoder: Decoder, size: LatentSize, budget: float, device: torch.device | str, *, batch: int = 1
) -> DecodePlan:
    """How the decoder streams with `budget` bytes of `device`; the rest as for `plan`."""
    available, dtype, is_cpu = usable(budget), dtype_of(decoder), torch.device(device).type == "cpu"
    weights = 0 if is_cpu else sum(parameter.nbytes for parameter in decoder.parameters())
    kept = kept_frames_bytes(decoder.config, size, batch=batch, dtype=dtype)
    needs = []
    # Frames that travel while others are worked on cost less than parts so small that every frame is copied thrice.
    for division in DIVISIONS:
        for on_host in (False,) if is_cpu else (False, True):
            values = VALUES_AT_ONCE // division
            need = streaming_decode_bytes(
                decoder.config, size, batch=batch, dtype=dtype, frames_on_host=on_host, values_at_once=values
            )
            if weights + need <= available:
                stay = min(kept, available - weights - need) if on_host else kept
                return DecodePlan(stay, kept if on_host else 0, values, weights, need + (stay if on_host else 0))
            needs.append(need)
    raise too_little_error(budget, weights + min(needs), "the decoder")


def usable(budget: float) -> int:
    """What of a budget may be given to what is counted."""
    return int(budget * (1 - KEPT_BACK))


def too_little_error(budget: float, need: int, name: str) -> MemoryBudgetError:
    """Says that `need` bytes are what would do."""
    least = need / (1 - KEPT_BACK)
    return MemoryBudgetError(
        f"The budget is {budget / 1e9:.3f} GB",
        f"{name} needs at least {least / 1e9 + 0.0005:.3f} GB",
        "Allow more memory, or a smaller or shorter video",
        least,
    )


def weight_bytes(network: nn.Module, blocks: Sequence[nn.Module], resident: int, device: torch.device) -> int:
    """As `device_bytes`; none on a CPU, where weights lie where they were loaded."""
    return 0 if device.type == "cpu" else device_bytes(network, blocks, resident)


def dtype_of(network: nn.Module) -> torch.dtype:
    """What a network computes in, as far as its parameters tell."""
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())


# What a plan says, done


@contextmanager
def placed(
    network: Any, blocks: Sequence[nn.Module], how: NetworkPlan, device: torch.device | str, check: Check | None = None
) -> Iterator[Traffic]:
    """The network runs on `device` as planned, for as long as the block runs. `check` as for `streamed`."""
    tokens_before = getattr(network, "tokens_at_once", None)
    with streamed(network, blocks, device, resident=how.resident, source=how.source, check=check) as traffic:
        try:
            if how.tokens_at_once != tokens_before:
                network.tokens_at_once = how.tokens_at_once
            yield traffic
        finally:
            if how.tokens_at_once != tokens_before:
                network.tokens_at_once = tokens_before


@contextmanager
def decode_context(how: DecodePlan, device: torch.device | str) -> Iterator[KeptContext]:
    """What `Decoder.stream` needs to decode one clip as planned, as long as the block runs."""
    store = HostFrames(device, how.frames_on_device) if how.frames_on_host else None
    try:
        yield KeptContext(store, how.values_at_once)
    finally:
        if store is not None:
            store.close()
