"""The table of attention kernels.

A kernel is a function `(q, k, v, key_mask) -> out` over `B A N D` tensors (batch, heads, tokens, head width);
`key_mask` is `B N`, true where a key may be attended, or None when all may. Kernels are imported when first asked
for, so that an optional one cannot break the import of this package.

`auto` is the fastest exact kernel that agrees with the reference kernel on this device; it is checked once. A name
that was asked for and is missing raises: nothing falls back in silence.
"""

import functools
import importlib
import logging
from typing import Protocol

import torch

from ..errors import KernelError

log = logging.getLogger(__name__)


class AttentionKernel(Protocol):
    """Softmax attention with scale `D ** -0.5`; returns a tensor of q's shape and dtype."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor: ...


# name -> module (beside this one) whose `attend` is the kernel
KERNELS = {"reference": "reference", "sdpa": "sdpa"}

# the exact kernels, fastest first
EXACT = ("sdpa", "reference")

# the largest difference to the reference kernel that rounding explains, for outputs of order one
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def get_kernel(name: str, device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel called `name`, or for `auto` the fastest exact one on this device.

    Raises `KernelError` when there is no such name, or when no kernel passes its check here.
    """
    check_name(name)
    if name == "auto":
        return _auto(torch.device(device.type, device.index), dtype)
    return importlib.import_module(f".{KERNELS[name]}", __package__).attend


def check_name(name: str) -> None:
    """Raises `KernelError` when there is no kernel called `name`."""
    if name != "auto" and name not in KERNELS:
        raise KernelError(
            f"attention is {name!r}", f"it must be one of auto, {', '.join(sorted(KERNELS))}", "Choose auto"
        )


@functools.cache
def _auto(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    for name in EXACT:
        kernel = get_kernel(name, device, dtype)
        try:
            error = self_check(kernel, device, dtype)
        except (RuntimeError, NotImplementedError) as failure:
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
    """The largest difference between `kernel` and the reference in float32, with and without a mask."""
    from .reference import attend as reference

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 32, generator=generator).to(device, dtype) for _ in range(3))
    mask = torch.arange(40, device=device) < torch.tensor([[40], [33]], device=device)
    wide = torch.promote_types(dtype, torch.float32)
    off = [
        (kernel(q, k, v, key_mask).to(wide) - reference(q.to(wide), k.to(wide), v.to(wide), key_mask)).abs().max()
        for key_mask in (None, mask)
    ]
    return torch.stack(off).max().item()  # unlike Python's, this maximum keeps a NaN
