"""Learned mixed rotary positions: each head has its own frequencies for time, row and column at once.

A token at (t, y, x) turns pair `f` of head `a` by `t*w[0,a,f] + y*w[1,a,f] + x*w[2,a,f]`. The three turns multiply as
complex numbers, so the table is a product of three small ones, each made in float64: exact, and no large cosine.

Rows and columns are spread so that any picture covers the area of 192 x 192 patches around the origin; that is how
the released frequencies were learned.

Shapes: `T H W` = latent frames, patch rows, patch columns, `N = T*H*W`, `A` heads, `F` frequencies (half a head).
"""

import math
from dataclasses import dataclass

import torch

from ..numerics import widen

TARGET_AREA = 192 * 192


def axis_positions(frames: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The coordinates of the grid along each axis, in float64."""
    spread = math.sqrt(TARGET_AREA / (rows * columns))

    def centered(count: int) -> torch.Tensor:
        return (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) * spread

    return torch.arange(frames, dtype=torch.float64), centered(rows), centered(columns)


@dataclass(frozen=True)
class FactoredRotations:
    """A table of rotations as two small factors: `factored[first:last]` is that part of it, made when asked for.

    `time`: `T A F`, `place`: `H*W A F`.
    """

    time: torch.Tensor
    place: torch.Tensor

    def __getitem__(self, tokens: slice) -> torch.Tensor:
        """The rows of consecutive tokens: `n A F`."""
        places = len(self.place)
        start, stop, step = tokens.indices(len(self.time) * places)
        index = torch.arange(start, stop, step, device=self.place.device)
        return self.time[index // places] * self.place[index % places]

    def table(self) -> torch.Tensor:
        """All of it, without the indices: `N A F`."""
        return (self.time[:, None] * self.place[None]).flatten(0, 1)


# What blocks are handed: slices of either are tables.
Rotation = torch.Tensor | FactoredRotations


def rotations(
    frequencies: torch.Tensor, frames: int, rows: int, columns: int, device: torch.device
) -> FactoredRotations:
    """Unit complex numbers that turn every token's pairs, as factors: the table is twice a visual stream in bfloat16.

    `frequencies`: `3 A F`, learned, in radians a step. Complex64 (complex128 for float64 weights).
    """
    complex_dtype = torch.complex128 if frequencies.dtype == torch.float64 else torch.complex64
    # Metal has no float64; the small tables are made on the CPU there.
    exact_device = torch.device("cpu") if device.type == "mps" else device

    def turns(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        angles = positions.to(exact_device).view(-1, 1, 1) * frequencies
        return torch.polar(torch.ones_like(angles), angles).to(device, complex_dtype)

    exact = frequencies.to(exact_device, torch.float64)
    time, row, column = (turns(p, f) for p, f in zip(axis_positions(frames, rows, columns), exact))
    return FactoredRotations(time, (row[:, None] * column[None, :]).flatten(0, 1))


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns neighbouring pairs of `x` (`B N A D`) by `table` (`N A D/2`); widened like the table."""
    pairs = torch.view_as_complex(widen(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2)
