"""torch's own fused attention, with the backend that is fastest on the device."""

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import nvidia
from .packing import each_sample

# torch 2.5 has no order of backends to set; its own is used there.
HAS_PRIORITY = "set_priority" in inspect.signature(sdpa_kernel).parameters

# Fastest first; torch takes the first that supports the inputs. From Hopper on, torch's flash backend is a kernel
# written for Ampere, and cuDNN's is not. Math comes last: it runs anywhere, but it builds all the scores.
AMPERE = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
HOPPER = (SDPBackend.CUDNN_ATTENTION, *AMPERE)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """See `kernels.AttentionKernel`.

    A ragged batch goes one sample at a time, without its masked keys: a mask rules out the fast backends of a GPU, and
    costs time on a CPU too.
    """
    with in_order(nvidia.capability(q.device)):
        return each_sample(F.scaled_dot_product_attention, q, k, v, key_mask)


def in_order(capability: tuple[int, int] | None) -> AbstractContextManager[object]:
    """A context in which torch tries its backends in our order, on an NVIDIA device of this compute capability."""
    if capability is None or not HAS_PRIORITY:
        return nullcontext()
    return sdpa_kernel(list(HOPPER if capability >= (9, 0) else AMPERE), set_priority=True)
