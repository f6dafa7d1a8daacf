"""Less memory for more time: what a backward needs of some blocks is computed once more, not kept from the forward.

A part is recomputed by itself: queries, keys and values with their norms and rotation; what follows the attention; the
feed-forward with its norm and gate. Or a block is as a whole, which keeps the least, and which streamed blocks need.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..dit import AsymmDiT
from ..dit.model import RunBlock, Streams
from ..errors import TrainingError
from ..memory.blocks import spread
from ..memory.training_need import Checkpoints

__all__ = ["Checkpoints", "checkpointed"]

# A LoRA's dropout draws from its own generator, the same again each time: no state of a global one need be kept.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def checkpointed(network: AsymmDiT, checkpoints: Checkpoints, *, resident: int | None = None) -> Iterator[RunBlock]:
    """The network whose first blocks recompute parts, as long as the block runs; gives its `run_block`.

    Counts above the depth mean all blocks. `resident` is how many blocks stay on the device where the others are
    streamed (`memory.blocks.streamed`): those others are recomputed as a whole, whatever `checkpoints` says. Hooks on a
    layer, as a LoRA's, run again as it does. Without gradients nothing is kept or recomputed, and nothing costs more.

    Raises `TrainingError` when `resident` is negative, or when a streamed block would not be recomputed whole.
    """
    if resident is not None and resident < 0:
        raise TrainingError(
            f"{resident} blocks shall stay on the device", "there cannot be less than none", "Ask for 0"
        )
    depth = len(network.blocks)
    streamed_blocks = [] if resident is None else spread(depth, resident)
    whole = {*range(min(checkpoints.blocks, depth)), *streamed_blocks}
    _check_streamed(network, whole)

    def run_block(index: int, block: nn.Module, *inputs: Any) -> Streams:
        return recomputed(block, *inputs) if index in whole else block(*inputs)  # pyright: ignore[reportReturnType]

    with ExitStack() as stack:
        for index, block in enumerate(network.blocks):
            if index in whole:
                continue
            if index < checkpoints.qkv:
                stack.enter_context(_replaced(block.attn, "visual_qkv"))
                stack.enter_context(_replaced(block.attn, "text_qkv"))
            if index < checkpoints.post_attention:
                stack.enter_context(_replaced(block, "after_attention"))
            if index < checkpoints.feed_forward:
                stack.enter_context(_replaced(block, "feed_forward"))
        yield run_block


def _check_streamed(network: AsymmDiT, whole: set[int]) -> None:
    """Streamed blocks lie elsewhere until it is their turn: a part alone would be recomputed with what is there."""
    here = network.pos_frequencies.device
    for index, block in enumerate(network.blocks):
        if index not in whole and any(tensor.device != here for tensor in (*block.parameters(), *block.buffers())):
            raise TrainingError(
                f"Block {index} is streamed, and shall not be recomputed as a whole",
                f"its weights are on {here} only while it runs",
                "Say how many blocks stay (resident), or recompute all blocks (Checkpoints(blocks=...))",
            )


@contextmanager
def _replaced(module: Any, method: str) -> Iterator[None]:
    """A module whose method is recomputed for its gradients; then it has what it had, its class's or its own."""
    entries = vars(module)
    had = {method: entries[method]} if method in entries else {}
    entries[method] = partial(recomputed, getattr(module, method))
    try:
        yield
    finally:
        del entries[method]
        entries.update(had)
