"""Flash attention over packed tokens: the samples of a batch lie one behind the other, and no padding is computed.

Four packages have it, under two sets of names. All are optional: one that is missing or broken is passed over.

Shapes: `B` batch, `A` heads, `N` tokens, `D` head width, `T` the tokens of all samples together.
"""

import functools
import importlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..errors import KernelError
from . import nvidia
from .packing import valid_keys

log = logging.getLogger(__name__)


class Provider(NamedTuple):
    """Where a package keeps its function, and what it calls the offsets and longest lengths of queries and keys."""

    module: str
    function: str
    arguments: tuple[str, str, str, str]


# Given by name: their order differs between packages, and between versions of one.
DAO_AI_LAB = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
PROVIDERS = {
    "flash-attn 2": Provider("flash_attn", "flash_attn_varlen_func", DAO_AI_LAB),
    "flash-attn 3": Provider("flash_attn_interface", "flash_attn_varlen_func", DAO_AI_LAB),
    "flash-attn 4": Provider("flash_attn.cute", "flash_attn_varlen_func", DAO_AI_LAB),
    "torch": Provider("torch.nn.attention.varlen", "varlen_attn", ("cu_seq_q", "cu_seq_k", "max_q", "max_k")),
}


def in_order(major: int) -> tuple[str, ...]:
    """The providers for devices of this compute capability, fastest first.

    3 is written for Hopper, 4 for Hopper and data-center Blackwell. 2, and torch's copy of it, run on every device
    from Ampere on without using what came later.
    """
    newer = {9: ("flash-attn 3", "flash-attn 4"), 10: ("flash-attn 4",), 11: ("flash-attn 4",)}
    return (*newer.get(major, ()), "flash-attn 2", "torch")


def require(device: torch.device, dtype: torch.dtype | None) -> None:
    """Raises `KernelError` when this kernel cannot run here, or no package provides it."""
    nvidia.require("flash", device, dtype)
    provider_for(device)


def is_fastest(device: torch.device) -> bool:
    """Whether this kernel is expected to beat sdpa: with flash-attn 3, written for Hopper, on Hopper."""
    try:
        require(device, None)
    except KernelError as reason:
        log.debug("%s", reason)
        return False
    return provider_for(device)[0] == "flash-attn 3"


@functools.cache
def provider_for(device: torch.device) -> tuple[str, Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]]:
    """The name and the function of the best provider installed. Raises `KernelError` when there is none."""
    major, minor = nvidia.capability(device) or (0, 0)
    failures = []
    for name in in_order(major):
        provider = PROVIDERS[name]
        try:
            function = getattr(importlib.import_module(provider.module), provider.function)
        except Exception as failure:  # a package built for another torch or CUDA can raise anything
            log.debug("flash attention from %s is not available: %r", name, failure)
            failures.append(f"{name}: {failure}")
            continue
        log.info("flash attention on %s (compute capability %s.%s): %s", device, major, minor, name)
        return name, function
    raise KernelError(
        f"attention is 'flash', and no package here provides it ({'; '.join(failures)})",
        f"on compute capability {major}.{minor} it comes from one of {', '.join(in_order(major))}",
        "Update torch to 2.10 or newer, or pip install flash-attn --no-build-isolation, or choose auto or sdpa",
    )


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """See `kernels.AttentionKernel`. Raises `KernelError` when there is no provider here."""
    name, function = provider_for(q.device)
    keys = valid_keys(k, v, key_mask)
    q_lengths, k_lengths = [q.shape[2]] * len(keys), [own_k.shape[2] for own_k, _ in keys]
    sequences = (
        offsets(q_lengths, q.device),
        offsets(k_lengths, q.device),
        max(q_lengths),
        max(k_lengths),
    )
    packed = (pack(q.split(1)), pack([own_k for own_k, _ in keys]), pack([own_v for _, own_v in keys]))
    # Some packages launch on the current device, whichever the tensors are on.
    with torch.cuda.device_of(q):
        out = function(*packed, **dict(zip(PROVIDERS[name].arguments, sequences)))
    # 4 and early 3 give the softmax's sums too.
    out = out[0] if isinstance(out, tuple) else out
    return out.unflatten(0, (len(q), q.shape[2])).transpose(1, 2)


def pack(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Samples `1 A n D`, one behind the other: `T A D`. One sample alone is not copied."""
    rows = [sample[0].transpose(0, 1) for sample in samples]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def offsets(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where each sequence starts among the packed tokens, and where the last one ends: `B+1` in int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
