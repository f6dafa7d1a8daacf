"""How a decode is wanted, and the tiles that makes of a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mochi_core.errors import ShapeError
from mochi_core.shapes import PIXELS_PER_LATENT, LatentSize, frames_of
from mochi_core.vae.tiling import decode_blended, decode_tiled

TILERS: dict[str, Callable[..., torch.Tensor]] = {"tiled spatial": decode_tiled, "tiled blended": decode_blended}
MODES = ("streaming", "full", *TILERS)
MOST_TILES, MOST_OVERLAP = 16, 64
# A picture that any tiles fit into.
LARGE = LatentSize(1, 4096, 4096)


@dataclass(frozen=True)
class DecodeOptions:
    """How a decode is wanted; tiles count for the tiled modes only."""

    mode: str = MODES[0]
    rows: int = 1
    columns: int = 1
    overlap: int = 0

    def tiles(self, size: LatentSize) -> list[LatentSize]:
        """The tiles that will be decoded. Raises `ShapeError` on tile numbers that do not fit.

        Asked of the tiling itself, which goes through its motions with tensors that hold nothing.
        """
        if self.mode not in TILERS:
            return [size]
        found: list[LatentSize] = []

        def decode(tile: torch.Tensor) -> torch.Tensor:
            found.append(LatentSize(*tile.shape[2:]))
            height, width = (n * PIXELS_PER_LATENT for n in tile.shape[3:])
            return tile.new_empty(1, 3, frames_of(size.frames), height, width)

        self.tiled(decode, torch.empty(1, 12, size.frames, size.height, size.width, device="meta"))
        return found

    def tiled(self, decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
        return TILERS[self.mode](decode, latents, self.rows, self.columns, self.overlap)


def check_tiles(mode: str, rows: int, columns: int, overlap: int) -> None:
    """Raises `ShapeError` on tile numbers that fit no picture."""
    if mode not in TILERS:
        return
    for name, value, most in (
        ("tile_rows", rows, MOST_TILES),
        ("tile_columns", columns, MOST_TILES),
        ("tile_overlap", overlap, MOST_OVERLAP),
    ):
        if value > most:
            raise ShapeError(f"{name} is {value}", f"it must be at most {most}", f"Use {most} or less")
    for each in ((rows, 1), (1, columns)):
        DecodeOptions(mode, *each, overlap).tiles(LARGE)


def largest(tiles: Sequence[LatentSize]) -> LatentSize:
    """The size that every tile fits into."""
    return LatentSize(tiles[0].frames, max(tile.height for tile in tiles), max(tile.width for tile in tiles))
