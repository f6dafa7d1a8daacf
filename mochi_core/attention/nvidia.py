"""What the kernels that only run on NVIDIA devices share: the capability they ask for, and how they say no."""

import torch

from ..errors import KernelError

OLDEST = (8, 0)
HALF = (torch.float16, torch.bfloat16)


def capability(device: torch.device) -> tuple[int, int] | None:
    """The CUDA compute capability, None on any device that is not NVIDIA's."""
    # ROCm calls its devices cuda too.
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def require(kernel: str, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raises `KernelError` unless `device` is NVIDIA's, new enough, and `dtype` is half precision (None: not known)."""
    found = capability(device)
    if found is None or found < OLDEST:
        given = device if found is None else f"{device} of compute capability {found[0]}.{found[1]}"
        raise KernelError(
            f"attention is {kernel!r} on {given}",
            f"{kernel} needs an NVIDIA device of compute capability {OLDEST[0]}.{OLDEST[1]} or newer",
            "Choose auto or sdpa",
        )
    if dtype is not None and dtype not in HALF:
        raise KernelError(
            f"attention is {kernel!r} in {dtype}",
            f"{kernel} computes in float16 or bfloat16 only",
            "Load the model as bfloat16, or choose auto or sdpa",
        )
