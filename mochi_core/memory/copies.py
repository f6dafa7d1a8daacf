"""Copies between host and device that run beside the device's work, and host memory that is fit for them."""

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)

# Devices that copy from and to pinned memory without the processor; torch calls AMD's cuda too.
PINNING = ("cuda", "xpu")
# torch rounds each pinned buffer up to a power of two: one of 410 MB would take 512 MB for good.
SMALLEST_PIECE = 16 << 20

Ticket = Any


class SideStream:
    """Copies that run beside what a device computes, in the order they are given.

    Where there are no streams (CPU, MPS), and when made `synchronous`, a copy is done when `copy` returns and the
    rest does nothing. Tensors must be kept until a ticket made after their copy was waited for.
    """

    def __init__(self, device: torch.device | str, *, synchronous: bool = False):
        self.device = torch.device(device)
        self._module: Any = torch.get_device_module(self.device)
        # torch.cpu has classes of these names that do nothing.
        has_streams = self.device.type != "cpu" and hasattr(self._module, "Stream")
        self._stream: Any = self._module.Stream(device=self.device) if has_streams and not synchronous else None

    @property
    def overlaps(self) -> bool:
        """Whether copies run beside the device's work, and so may be given from any thread."""
        return self._stream is not None

    @torch.no_grad()
    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """`target.copy_(source)` on the side stream, after what it was given before."""
        if self._stream is None:
            target.copy_(source)
            return
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Ticket:
        """A ticket for all copies given so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, ticket: Ticket) -> None:
        """What the device computes from now on comes after the ticket's copies. Does not stop the caller."""
        if self._stream is not None:
            self._module.current_stream(self.device).wait_event(ticket)

    def follow(self) -> None:
        """Copies from now on come after all that the device was given to compute: what it reads is left alone."""
        if self._stream is not None:
            self._stream.wait_stream(self._module.current_stream(self.device))

    def finish(self, ticket: Ticket) -> None:
        """Returns when the ticket's copies are done, for who reads or reuses host memory."""
        if self._stream is not None:
            ticket.synchronize()


def pinned(like: torch.Tensor | int, device: torch.device | str) -> torch.Tensor:
    """An unfilled host buffer: of `like` bytes, or with the shape and dtype of `like`.

    It is pinned where `device` gains from that. When the system does not let so much memory be locked, it is ordinary
    memory, which copies more slowly and makes the caller wait; the first time that is logged.
    """
    shape, dtype = ((like,), torch.uint8) if isinstance(like, int) else (tuple(like.shape), like.dtype)
    with torch.inference_mode(False):
        if _can_pin(torch.device(device)):
            try:
                return torch.empty(shape, dtype=dtype, pin_memory=True)
            except RuntimeError as error:
                _warn_once(str(error).partition("\n")[0])
        return torch.empty(shape, dtype=dtype)


def pinned_pieces(size: int, device: torch.device | str) -> list[torch.Tensor]:
    """Host buffers of `size` bytes together, as `pinned`, in pieces of which torch wastes little."""
    pieces = []
    while size:
        piece = min(size, max(SMALLEST_PIECE, 1 << (size.bit_length() - 1)))
        pieces.append(pinned(piece, device))
        size -= piece
    return pieces


def _can_pin(device: torch.device) -> bool:
    return device.type in PINNING and torch.get_device_module(device).is_available()


_warned: list[str] = []


def _warn_once(reason: str) -> None:
    if not _warned:
        _warned.append(reason)
        log.warning(
            "The system did not lock memory for fast copies to the device (%s): ordinary memory is used, which is "
            "slower. A higher limit (ulimit -l), or less of the model on the host, would help.",
            reason,
        )
