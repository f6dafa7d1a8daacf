import pytest
import torch

from mochi_core.errors import ShapeError
from mochi_core.vae.tiling import blend, decode_blended, decode_tiled

pytestmark = pytest.mark.usefixtures("no_gradients")


def pixel_by_pixel(latents):
    """A decoder for which tiles change nothing: each latent pixel becomes 8 x 8 equal pixels."""
    return latents[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)


def latents(height, width):
    return torch.randn(1, 12, 2, height, width, generator=torch.Generator().manual_seed(0))


def test_blend_against_the_reference(goldens, dtype):
    units = goldens.tensors("units")
    out = blend(units["in/blend_a"].to(dtype), units["in/blend_b"].to(dtype), 4, -1)
    goldens.check(out, units["out_f64/blend_horizontal_overlap4"], "unit/blend_horizontal_overlap4")


def test_blend_of_rows_is_that_of_columns_turned(goldens):
    a, b = (goldens.tensors("units")[f"in/blend_{side}"] for side in "ab")
    assert torch.equal(blend(a.mT, b.mT, 4, -2), blend(a, b, 4, -1).mT)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (30, 53)])
@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("overlap", (0, 2, 4))
def test_tiles_cover_the_picture(size, rows, columns, overlap):
    z = latents(*size)
    torch.testing.assert_close(decode_tiled(pixel_by_pixel, z, rows, columns, overlap), pixel_by_pixel(z))


@pytest.mark.parametrize("rows, columns, tiles", [(1, 1, 1), (2, 1, 2), (4, 2, 8)])
def test_each_tile_is_decoded_once(rows, columns, tiles):
    sizes = []

    def decode(tile):
        sizes.append(tile.shape[-2:])
        return pixel_by_pixel(tile)

    decode_tiled(decode, latents(16, 16), rows, columns, 0)
    assert sizes == [(16 // rows, 16 // columns)] * tiles


@pytest.mark.parametrize("count", (0, 3, -2, 6))
def test_tile_numbers_are_powers_of_two(count):
    with pytest.raises(ShapeError, match=rf"^tile rows is {count}: it must be a power of two\. Use 1, 2, 4 or 8\.$"):
        decode_tiled(pixel_by_pixel, latents(16, 16), count, 1)
    with pytest.raises(ShapeError, match=rf"^tile columns is {count}: "):
        decode_tiled(pixel_by_pixel, latents(16, 16), 1, count)


@pytest.mark.parametrize("overlap, even", [(3, 2), (-2, 2), (1, 0)])
def test_overlap_is_even(overlap, even):
    with pytest.raises(
        ShapeError, match=rf"^overlap is {overlap}: it must be an even number, zero or more\. Use {even}\.$"
    ):
        decode_tiled(pixel_by_pixel, latents(16, 16), 2, 2, overlap)


@pytest.mark.parametrize("size, count, overlap", [(4, 8, 0), (4, 2, 6), (16, 8, 8)])
def test_tiles_smaller_than_their_overlap(size, count, overlap):
    message = rf"{count} tile columns of {size} latent pixels with an overlap of {overlap}: .*Use fewer tiles"
    with pytest.raises(ShapeError, match=message):
        decode_tiled(pixel_by_pixel, latents(16, size), 1, count, overlap)


class TestBlended:
    @pytest.mark.parametrize("size", [(8, 8), (9, 13), (30, 53)])
    @pytest.mark.parametrize("rows, columns", [(1, 1), (1, 3), (2, 1), (3, 2), (4, 4)])
    @pytest.mark.parametrize("overlap", (0, 1, 2))
    def test_tiles_cover_the_picture(self, size, rows, columns, overlap):
        z = latents(*size)
        torch.testing.assert_close(decode_blended(pixel_by_pixel, z, rows, columns, overlap), pixel_by_pixel(z))

    @pytest.mark.parametrize("count", (1, 2, 9))
    def test_every_frame_is_there(self, tiny, count):
        z = torch.randn(1, 12, count, 8, 12, generator=torch.Generator().manual_seed(0))
        out = decode_blended(tiny.decoder, z, 2, 3, 2)
        assert out.shape == (1, 3, 6 * (count - 1) + 1, 64, 96)
        # No seam that one could see, and no other picture.
        whole = tiny.decoder(z)
        assert (out - whole).abs().mean() < 0.25 * whole.abs().mean()

    def test_neighbours_fade_into_each_other(self):
        tiles = iter((0.0, 1.0))
        out = decode_blended(lambda tile: torch.full_like(pixel_by_pixel(tile), next(tiles)), latents(4, 10), 1, 2, 2)
        line = out[0, 0, 0, 0]
        assert (line[:32] == 0).all() and (line[48:] == 1).all()
        torch.testing.assert_close(line[32:48], (torch.arange(16) + 0.5) / 16)

    @pytest.mark.parametrize(
        "rows, columns, overlap, what",
        [(0, 1, 0, "0 tile rows"), (1, 17, 0, "17 tile columns"), (8, 1, 4, "8 tile"), (1, 2, -2, "1 tile")],
    )
    def test_tiles_that_do_not_fit(self, rows, columns, overlap, what):
        with pytest.raises(
            ShapeError, match=rf"^{what}.* of 16 latent pixels with an overlap of {overlap}: there must"
        ):
            decode_blended(pixel_by_pixel, latents(16, 16), rows, columns, overlap)
