"""What a budget of memory allows a LoRA's training: what is recomputed for gradients, and which blocks are streamed.

print(plan_training(24e9, VideoSize(848, 480, 37), network))

A plan is made before anything is moved. `training.checkpointing.checkpointed` and `blocks.streamed` do what it says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..dit import AsymmDiT
from ..shapes import VideoSize
from ..text.tokenizer import MAX_TOKENS
from ..weights.quantized import unpacking_bytes
from .plan import dtype_of, too_little_error, usable, waiting_place, weight_bytes
from .training_need import QKV_AND_OUT, Checkpoints, lora_bytes, training_activations
from .waiting import Source


@dataclass(frozen=True)
class TrainingPlan:
    """How a LoRA is trained: `resident` of the blocks stay on the device, the others wait in `source`. Printable.

    `weights`, `activations` and `lora` (factors, gradients and the optimiser's states) are bytes on the device at the
    peak; `streamed_bytes` wait on the host.
    """

    budget: int
    size: VideoSize
    device: torch.device
    blocks: int
    resident: int
    checkpoints: Checkpoints
    source: Source
    weights: int
    activations: int
    lora: int
    streamed_bytes: int = 0

    @property
    def peak(self) -> int:
        """Bytes on the device at the worst moment."""
        return self.weights + self.activations + self.lora

    def __str__(self) -> str:
        size = self.size
        held = f"{self.resident} of {self.blocks} blocks resident" if self.weights else "weights where they were loaded"
        if self.resident < self.blocks:
            where = "host memory" if self.source == "pinned" else "the file"
            held += f", {self.streamed_bytes / 1e9:.2f} GB streamed from {where}"
        lines = [
            f"{size.width} x {size.height}, {size.frames} frames, {self.budget / 1e9:.1f} GB on {self.device}",
            f"  weights     {self.weights / 1e9:6.2f} GB  {held}",
            f"  activations {self.activations / 1e9:6.2f} GB  {self.checkpoints}",
            f"  LoRA        {self.lora / 1e9:6.2f} GB  with gradients and the optimiser's states",
            f"  together    {self.peak / 1e9:6.2f} GB",
        ]
        return "\n".join(lines)


def plan_training(
    budget: float,
    size: VideoSize,
    network: AsymmDiT,
    device: torch.device | str = "cuda",
    *,
    batch: int = 1,
    text_tokens: int = MAX_TOKENS,
    ranks: Mapping[str, int] = QKV_AND_OUT,
    averaged: bool = False,
    host_bytes: int | None = None,
) -> TrainingPlan:
    """How a LoRA of `network`, which on the meta device will do, learns from videos of `size` in `budget` bytes.

    What costs the least time comes first: nothing is recomputed; feed-forwards are, of as few blocks as will do; then
    what is around the attention; then whole blocks; then as few blocks as will do are streamed. Of those `host_bytes`
    may be pinned: by default, most of what is free. `ranks` and `averaged` are the LoRA's, as for `lora_bytes`.

    Raises `MemoryBudgetError`, which says the least that will do.
    """
    device, dtype = torch.device(device), dtype_of(network)
    blocks: Any = network.blocks
    count, available = len(blocks), usable(budget)
    lora = lora_bytes(network.config, ranks, averaged=averaged)
    unpacking = unpacking_bytes(network, dtype)

    @cache
    def held(resident: int) -> int:
        return weight_bytes(network, blocks, resident, device)

    @cache
    def needed(checkpoints: Checkpoints) -> int:
        options: dict[str, Any] = dict(batch=batch, text_tokens=text_tokens, dtype=dtype, ranks=ranks)
        return unpacking + training_activations(network.config, size.latent, checkpoints=checkpoints, **options)

    needs = []
    for resident, checkpoints in _ways(count, streams=device.type != "cpu"):
        weights, activations = held(resident), needed(checkpoints)
        need = weights + activations + lora
        if need <= available:
            source, waiting = waiting_place(blocks, resident, device, host_bytes)
            parts = weights, activations, lora
            return TrainingPlan(int(budget), size, device, count, resident, checkpoints, source, *parts, waiting)
        needs.append(need)
    raise too_little_error(budget, min(needs), "the training")


def _ways(count: int, streams: bool) -> Iterator[tuple[int, Checkpoints]]:
    """How many blocks stay on the device, and what is recomputed; from the fastest way on.

    The MLP goes first: for each byte it gives back it takes the least time. Streamed blocks must be recomputed whole.
    """
    yield count, Checkpoints()
    for some in range(1, count + 1):
        yield count, Checkpoints(feed_forward=some)
    for some in range(1, count + 1):
        yield count, Checkpoints(qkv=some, feed_forward=count, post_attention=some)
    for some in range(1, count + 1):
        yield count, Checkpoints(qkv=count, feed_forward=count, post_attention=count, blocks=some)
    if streams:
        for resident in range(count - 1, -1, -1):
            yield resident, Checkpoints(blocks=count)
