"""Chance without state: every draw of a training is a function of its seed and of what it is for.

So a training taken up again draws what it would have drawn, with nothing to remember but how far it was.
"""

import hashlib

import torch


def generator(seed: int, *what: str | int) -> torch.Generator:
    """A generator of its own for `what`, on the CPU: the same numbers on every machine."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
