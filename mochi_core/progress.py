"""How long work reports itself, and how it is cancelled."""

from typing import Protocol

import torch


class Progress(Protocol):
    """Called after each unit of work; cancels by raising whatever the caller understands."""

    def __call__(self, step: int, total: int, preview: torch.Tensor | None = None) -> None:
        """`step` of `total` units are done; `preview` is what the work looks like so far."""
        ...


def silent(step: int, total: int, preview: torch.Tensor | None = None) -> None:
    """The progress nobody watches."""
