"""Decoding in overlapping tiles: as the reference's `tiled_spatial`, for videos that must match older ones, or freely.

Tiles see no pixels beyond their edge and each norm sees its tile only, so this is not exact: a blend hides the seams.
Tiles are of space alone, so every frame is there. `Decoder.stream` needs no tiles.

Shapes: `B C T H W` = batch, channels, frames, rows, columns; `t h w` the same in latent space.
"""

from collections.abc import Callable

import torch

from ..errors import ShapeError
from ..numerics import widen


def decode_tiled(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, rows: int, columns: int, overlap: int = 0
) -> torch.Tensor:
    """`decode` on `rows` x `columns` tiles, each a halving of a halving, blended linearly where they overlap.

    `latents`: `B C t h w`; `overlap` in latent pixels, even. Returns what `decode` returns, `B 3 T H W`.
    Raises `ShapeError` on tile numbers that are no powers of two, or tiles smaller than their overlap.
    """
    for name, count, size in (("tile rows", rows, latents.shape[-2]), ("tile columns", columns, latents.shape[-1])):
        if count < 1 or count & (count - 1):
            raise ShapeError(f"{name} is {count}", "it must be a power of two", "Use 1, 2, 4 or 8")
        if count > 1 and size // count < max(1, overlap // 2):
            raise ShapeError(
                f"{count} {name} of {size} latent pixels with an overlap of {overlap}",
                "a tile must be at least half as large as its overlap",
                "Use fewer tiles or a smaller overlap",
            )
    if overlap < 0 or overlap % 2:
        raise ShapeError(
            f"overlap is {overlap}", "it must be an even number, zero or more", f"Use {abs(overlap) // 2 * 2}"
        )
    return _halve(decode, latents, rows, columns, overlap)


def _halve(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, rows: int, columns: int, overlap: int
) -> torch.Tensor:
    if rows == columns == 1:
        return decode(latents)
    dim = -1 if columns > 1 else -2
    rest = (rows, columns // 2) if columns > 1 else (rows // 2, columns)
    size = latents.shape[dim]
    half = size // 2
    before = latents.narrow(dim, 0, half + overlap // 2)
    after = latents.narrow(dim, half - overlap // 2, size - half + overlap // 2)
    first, second = (_halve(decode, part, *rest, overlap) for part in (before, after))
    return blend(first, second, overlap * first.shape[dim] // before.shape[dim], dim)


def blend(first: torch.Tensor, second: torch.Tensor, overlap: int, dim: int) -> torch.Tensor:
    """The two side by side along `dim`, crossfaded linearly over `overlap` pixels that both have."""
    if overlap == 0:
        return torch.cat([first, second], dim=dim)
    start = first.shape[dim] - overlap
    weight = torch.arange(1, overlap + 1, dtype=first.dtype, device=first.device) / (overlap + 1)
    weight = weight.view(-1, *[1] * (-dim - 1))
    crossfade = torch.lerp(first.narrow(dim, start, overlap), second.narrow(dim, 0, overlap), weight)
    tail = second.narrow(dim, overlap, second.shape[dim] - overlap)
    return torch.cat([first.narrow(dim, 0, start), crossfade, tail], dim=dim)


def decode_blended(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, rows: int, columns: int, overlap: int = 4
) -> torch.Tensor:
    """`decode` on `rows` x `columns` tiles of one size, any number of each, crossfaded linearly where they overlap.

    `latents`: `B C t h w`; `overlap` in latent pixels. Returns `B 3 T H W`, widened, every frame of it.

    Raises `ShapeError` on tiles that are more than there are pixels, or that overlap more than their neighbours.
    """
    height, width = latents.shape[-2:]
    row_tiles = _spans("tile rows", rows, height, overlap)
    column_tiles = _spans("tile columns", columns, width, overlap)
    out = None
    for top, bottom in row_tiles:
        for left, right in column_tiles:
            tile = widen(decode(latents[..., top:bottom, left:right]))
            down, across = tile.shape[-2] // (bottom - top), tile.shape[-1] // (right - left)
            if out is None:
                out = tile.new_zeros((*tile.shape[:-2], height * down, width * across))
            weight = _share(row_tiles, (top, bottom), down, tile)[:, None]
            weight = weight * _share(column_tiles, (left, right), across, tile)
            out[..., top * down : bottom * down, left * across : right * across] += tile * weight
    assert out is not None
    return out


def _spans(name: str, count: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Where the tiles lie along one axis: of the same length, from the first pixel to the last."""
    length = -(-(size + (count - 1) * overlap) // max(count, 1))
    if overlap < 0 or not 1 <= count <= size or (count > 1 and length < 2 * overlap):
        raise ShapeError(
            f"{count} {name} of {size} latent pixels with an overlap of {overlap}",
            "there must be at least one, and each at least twice as long as what it shares with a neighbour",
            "Use fewer tiles or a smaller overlap",
        )
    return [(start, start + length) for start in (round(i * (size - length) / max(count - 1, 1)) for i in range(count))]


def _share(spans: list[tuple[int, int]], own: tuple[int, int], scale: int, like: torch.Tensor) -> torch.Tensor:
    """How much of each pixel along one axis comes from this tile; the shares of all tiles add up to one."""
    size = spans[-1][1] * scale
    position = torch.arange(size, dtype=torch.float64) + 0.5

    def weight(start: int, end: int) -> torch.Tensor:
        # Beyond the picture's edge there is nobody to share with.
        rise = position - start * scale if start else position + size
        fall = end * scale - position if end * scale < size else 2 * size - position
        return torch.minimum(rise, fall).clamp(min=0)

    share = weight(*own) / sum(weight(*span) for span in spans)
    return share[own[0] * scale : own[1] * scale].to(like)
