"""The table of attention kernels.

A kernel is a function `(q, k, v, key_mask) -> out` over `B A N D` tensors (batch, heads, tokens, head width);
`key_mask` is `B N`, true where a key may be attended, or None when all may. Kernels are imported when first asked
for, so that an optional one cannot break the import of this package.

`auto` is the first kernel of `exact_kernels` that runs on this device and agrees with the reference kernel there; it is
checked once. A name that was asked for and cannot run raises: nothing falls back in silence.
"""

import functools
import importlib
import logging
from types import ModuleType
from typing import Protocol

import torch

from ..errors import KernelError

log = logging.getLogger(__name__)


class AttentionKernel(Protocol):
    """Softmax attention with scale `D ** -0.5`; returns a tensor of q's shape and dtype.

    A query's own mask changes nothing. Where a sample has no valid key, outputs are finite and meaningless.
    """

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor: ...


# Each is the `attend` of the module beside this one that has its name. A module whose kernel does not run everywhere
# has `require(device, dtype or None)` too, which raises `KernelError` where it does not.
KERNELS = ("reference", "sdpa", "flash", "sage")

# the largest difference to the reference kernel that rounding explains, for outputs of order one
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def get_kernel(name: str, device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel called `name`, or for `auto` the fastest exact one on this device.

    Raises `KernelError` when there is no such name, when the kernel cannot run on this device in this dtype or its
    package is missing, or when no kernel passes auto's check here.
    """
    check_name(name)
    if name == "auto":
        return _auto(torch.device(device.type, device.index), dtype)
    return _module(name, device, dtype).attend


def check_name(name: str) -> None:
    """Raises `KernelError` when there is no kernel called `name`."""
    if name != "auto" and name not in KERNELS:
        raise KernelError(
            f"attention is {name!r}", f"it must be one of auto, {', '.join(sorted(KERNELS))}", "Choose auto"
        )


def check_kernel(name: str, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Raises `KernelError` when `get_kernel` would, as far as it can be told without running anything.

    `dtype` is None while it is not known yet.
    """
    check_name(name)
    if name != "auto":
        _module(name, device, dtype)


def exact_kernels(device: torch.device) -> tuple[str, ...]:
    """The exact kernels for this device, expected fastest first.

    The order is written down, not timed, so that one machine makes the same video each time. sdpa has torch's flash
    and cuDNN's kernels inside and handles every dtype, so flash comes first only with a package that torch lacks and
    that is written for the device: flash-attn 3 on Hopper.
    """
    if device.type != "cuda":
        return ("sdpa", "reference")
    from .flash import is_fastest

    return ("flash", "sdpa", "reference") if is_fastest(device) else ("sdpa", "flash", "reference")


def _module(name: str, device: torch.device, dtype: torch.dtype | None) -> ModuleType:
    module = importlib.import_module(f".{name}", __package__)
    if hasattr(module, "require"):
        module.require(device, dtype)
    return module


@functools.cache
def _auto(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    for name in exact_kernels(device):
        try:
            kernel = get_kernel(name, device, dtype)
        except KernelError as reason:
            log.info("attention kernel %s passed over: %s", name, reason)
            continue
        try:
            error = self_check(kernel, device, dtype)
        except Exception as failure:  # an optional package's kernel can raise anything
            log.warning("attention kernel %s cannot run on %s in %s: %s", name, device, dtype, failure)
            continue
        if error <= TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]):
            log.info("attention: %s on %s in %s (off the reference by %.1e)", name, device, dtype, error)
            return kernel
        log.warning("attention kernel %s is off by %.1e on %s in %s: not used", name, error, device, dtype)
    raise KernelError(
        f"No attention kernel works on {device} in {dtype}",
        "at least the reference kernel must",
        "Choose another dtype, or update torch and the device's driver",
    )


def self_check(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between `kernel` and the reference in float32: one sample, a batch, a ragged batch."""
    # On a GPU the released model's head width, and tokens that no block size divides.
    tokens, width = (300, 128) if device.type == "cuda" else (40, 32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, tokens, width, generator=generator).to(device, dtype) for _ in range(3))
    place = torch.arange(tokens, device=device)
    mask = torch.stack([place < tokens, place < tokens - 7, place % 3 > 0])
    # Large, so that a single masked key that is attended shows.
    masked_v = v.masked_fill(~mask[:, None, :, None], 100)
    off = [
        _difference(kernel, q[:1], k[:1], v[:1], None),
        _difference(kernel, q, k, v, None),
        _difference(kernel, q, k, masked_v, mask),
    ]
    return torch.stack(off).max().item()  # unlike Python's, this maximum keeps a NaN


def _difference(
    kernel: AttentionKernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
) -> torch.Tensor:
    from .reference import attend as reference

    wide = torch.promote_types(q.dtype, torch.float32)
    expected = reference(q.to(wide), k.to(wide), v.to(wide), key_mask)
    return (kernel(q, k, v, key_mask).to(wide) - expected).abs().max()
