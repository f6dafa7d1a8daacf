"""Weights that stay packed in memory, in blocks of few bits with scales of their own, and are unpacked for each use.

The layouts are those of GGUF files. Letters: n blocks, s sub-blocks of a block that share a scale, v values of one.
Numbers match the format's definition bit for bit: the scales are multiplied first and in float32, and nothing is fused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import WeightsError

# How many weights are unpacked at once, which bounds what a call needs beside its result: some 150 MB on a GPU. A CPU
# is about three times as fast when this stays near its caches.
VALUES_AT_ONCE = 2**24
VALUES_AT_ONCE_ON_CPU = 2**20


@dataclass(frozen=True)
class BlockFormat:
    """One way to pack `values` weights into `bytes` bytes.

    `unpack` turns (n, bytes) uint8 into (n, values) float32.
    """

    name: str
    values: int
    bytes: int
    unpack: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix whose rows are whole blocks: `data` is (rows, bytes of a row) uint8.

    Raises `WeightsError` when `data` is anything else.
    """

    data: torch.Tensor
    format: BlockFormat

    def __post_init__(self):
        if self.data.dtype != torch.uint8 or self.data.ndim != 2 or self.data.shape[1] % self.format.bytes:
            raise WeightsError(
                f"packed weights of shape {tuple(self.data.shape)} and {self.data.dtype}",
                f"{self.format.name} is kept as rows of bytes, {self.format.bytes} for each block",
                "Get the file again",
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix, in weights."""
        rows, row_bytes = self.data.shape
        return rows, row_bytes // self.format.bytes * self.format.values

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix, (rows, columns), on the device of its data."""
        return dequantize(self.data, self.format, dtype)


def dequantize(data: torch.Tensor, format: BlockFormat, dtype: torch.dtype) -> torch.Tensor:
    """The weights of (rows, bytes of a row) uint8, (rows, columns): float32 arithmetic, rounded once to `dtype`."""
    blocks = data.reshape(-1, format.bytes)
    at_once = _values_at_once(data.device) // format.values
    if len(blocks) <= at_once:
        return format.unpack(blocks).to(dtype).view(len(data), -1)
    weights = torch.empty(len(blocks), format.values, dtype=dtype, device=data.device)
    for first in range(0, len(blocks), at_once):
        weights[first : first + at_once] = format.unpack(blocks[first : first + at_once])
    return weights.view(len(data), -1)


def quantize(weight: torch.Tensor, format: BlockFormat) -> Packed:
    """Packs a matrix, (rows, columns), on its device.

    Raises `WeightsError` for a format that is only read, for rows that are no whole blocks, and for weights that the
    format's float16 scales cannot hold.
    """
    pack = _PACK.get(format.name)
    if pack is None:
        raise WeightsError(
            f"weights to pack as {format.name}", f"only {' and '.join(_PACK)} can be written", "Choose one of those"
        )
    if weight.ndim != 2 or weight.shape[1] % format.values:
        raise WeightsError(
            f"a weight of shape {tuple(weight.shape)} to pack as {format.name}",
            f"it must be a matrix whose columns are a multiple of {format.values}",
            "Leave this weight as it is",
        )
    blocks = weight.reshape(-1, format.values)
    packed = torch.empty(len(blocks), format.bytes, dtype=torch.uint8, device=weight.device)
    at_once = _values_at_once(weight.device) // format.values
    for first in range(0, len(blocks), at_once):
        scale, values = pack(blocks[first : first + at_once].float())
        packed[first : first + at_once, :2] = scale.view(torch.uint8)
        packed[first : first + at_once, 2:] = values
    if not packed[:, :2].view(torch.float16).isfinite().all():
        raise WeightsError(
            f"a weight to pack as {format.name} has values that are huge or not numbers",
            f"{format.name} scales its blocks in float16",
            "Leave this weight as it is, or get the file again",
        )
    return Packed(packed.view(len(weight), -1), format)


def _values_at_once(device: torch.device) -> int:
    return VALUES_AT_ONCE_ON_CPU if device.type == "cpu" else VALUES_AT_ONCE


def _float16(blocks: torch.Tensor) -> torch.Tensor:
    """Pairs of bytes as the float16 numbers they are, in float32."""
    # Cloned, because bytes that begin at an odd place cannot be viewed as anything wider.
    return blocks.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _bits(packed: torch.Tensor, width: int) -> torch.Tensor:
    """(..., bytes) uint8 in fields of `width` bits: (..., 8 / width, bytes), the lowest bits of every byte first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-2) >> shifts[:, None]) & (2**width - 1)


def _unpack_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """float16 scale, 32 int8."""
    return _float16(blocks[:, :2]) * blocks[:, 2:].view(torch.int8)


def _unpack_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """float16 scale, 16 bytes of two values each, 8 too large: the low halves come before the high ones."""
    values = _bits(blocks[:, 2:], 4).flatten(1).view(torch.int8) - 8
    return _float16(blocks[:, :2]) * values


def _unpack_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """Scales, 8 sub-blocks of 32 values in 4 bits: 32 bytes are a sub-block in their low halves, one in their high."""
    values = _bits(blocks[:, 16:].unflatten(1, (4, 32)), 4)
    return _scaled_and_shifted(blocks[:, :16], values.flatten(1, 2))


def _unpack_q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """Scales, the highest bits of 8 sub-blocks of 32 values, bit by bit, and their low 4 bits as in Q4_K."""
    highest = _bits(blocks[:, 16:48], 1)
    low = _bits(blocks[:, 48:].unflatten(1, (4, 32)), 4)
    return _scaled_and_shifted(blocks[:, :16], low.flatten(1, 2) | (highest << 4))


def _scaled_and_shifted(scales: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Scales and minima of Q4_K and Q5_K on their values: (n, 16) and (n, s = 8, v = 32) uint8 to (n, 256) float32.

    The 16 bytes are two float16, for all scales and for all minima, and then 6 bits for each of 8 scales and 8 minima:
    4 bytes have the first four scales below the two high bits of the last four, 4 more the same for the minima, and
    in the last 4 are the low bits of the last four scales and, above them, of the last four minima.
    """
    first = scales[:, 4:12].unflatten(1, (2, 4))
    last = _bits(scales[:, 12:], 4) | ((first >> 2) & 0b110000)
    scale, minimum = (_float16(scales[:, :4])[:, :, None] * torch.cat((first & 0b111111, last), dim=2)).unbind(1)
    return (scale[:, :, None] * values).sub_(minimum[:, :, None]).flatten(1)


def _unpack_q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """Low 4 bits, high 2 bits, int8 scales of 16 sub-blocks of 16 values, float16 for all; values are 32 too large.

    Each half of the block is 4 runs of 32 values: 64 bytes have the low bits of the first two runs in their low halves
    and of the last two in their high ones, 32 bytes have the high bits of all four.
    """
    low = _bits(blocks[:, :128].unflatten(1, (2, 64)), 4).view(-1, 2, 4, 32)
    high = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), 2)
    values = (low | (high << 4)).view(-1, 16, 16).view(torch.int8) - 32
    scale = _float16(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8)
    return (scale[:, :, None] * values).flatten(1)


def _pack_q8_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, (n, 1) float16, and values, (n, 32) uint8, of (n, 32) float32."""
    scale = blocks.abs().amax(1, keepdim=True) / 127
    values = blocks * _reciprocal(scale)
    whole = values.trunc()
    # Halves are rounded away from zero. Adding a half and truncating would also lift the number just below one.
    return scale.half(), (whole + (2 * (values - whole)).trunc()).to(torch.int8).view(torch.uint8)


def _pack_q4_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, (n, 1) float16, and pairs of values, (n, 16) uint8, of (n, 32) float32."""
    # The value furthest from zero becomes -8, the one number whose opposite 4 bits cannot hold.
    furthest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = furthest / -8
    values = (blocks * _reciprocal(scale) + 8.5).clamp_(0, 15).to(torch.uint8)
    return scale.half(), values[:, :16] | (values[:, 16:] << 4)


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for blocks of zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)


BLOCK_FORMATS: Mapping[str, BlockFormat] = {
    format.name: format
    for format in (
        BlockFormat("Q8_0", 32, 34, _unpack_q8_0),
        BlockFormat("Q6_K", 256, 210, _unpack_q6_k),
        BlockFormat("Q5_K", 256, 176, _unpack_q5_k),
        BlockFormat("Q4_K", 256, 144, _unpack_q4_k),
        BlockFormat("Q4_0", 32, 18, _unpack_q4_0),
    )
}

_PACK = {"Q8_0": _pack_q8_0, "Q4_0": _pack_q4_0}
