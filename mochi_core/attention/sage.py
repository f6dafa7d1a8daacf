"""SageAttention: queries and keys in 8 bits. Faster and not exact, so only for those who ask for it by name.

Version 1 is the package on PyPI, in Triton; version 2 is built from its source. Both have the function used here.

Shapes: `B` batch, `A` heads, `N` tokens, `D` head width.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..errors import KernelError
from . import nvidia
from .packing import each_sample

# the head widths that both versions have on every device
WIDTHS = (64, 128)


def require(device: torch.device, dtype: torch.dtype | None) -> None:
    """Raises `KernelError` when this kernel cannot run here, or the package is missing."""
    nvidia.require("sage", device, dtype)
    sageattn()


@functools.cache
def sageattn() -> Callable[..., torch.Tensor]:
    """The package's function. Raises `KernelError` when it cannot be imported."""
    try:
        return importlib.import_module("sageattention").sageattn
    except Exception as failure:  # a package built for another torch or CUDA can raise anything
        raise KernelError(
            f"attention is 'sage', and sageattention cannot be imported ({failure})",
            "it is an optional package",
            "pip install sageattention, or choose auto or sdpa",
        ) from failure


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """See `kernels.AttentionKernel`. Raises `KernelError` when the package is missing or the heads are too wide."""
    return each_sample(_attend, q, k, v, key_mask)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    width = q.shape[-1]
    # Zeros change neither the scores nor the values before them.
    padding = next((wide - width for wide in WIDTHS if wide >= width), None)
    if padding is None:
        raise KernelError(
            f"attention is 'sage', and the heads are {width} wide",
            f"sage takes heads of at most {WIDTHS[-1]}",
            "Choose auto or sdpa",
        )
    q, v = (F.pad(x, (0, padding)) if padding else x for x in (q, v))
    # A copy in any case: version 1 takes the mean off the keys in place.
    k = F.pad(k, (0, padding)) if padding else k.clone()
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(q):
        out = sageattn()(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=width**-0.5)
    return out[..., :width]
