import pytest
import torch

from mochi_core.dit.rope import axis_positions, rotate, rotations

pytestmark = pytest.mark.usefixtures("no_gradients")
CPU = torch.device("cpu")
GRIDS = {"2x3x5": "rope_freqs_a", "3x4x4": "rope_freqs_c"}


@pytest.fixture
def units(goldens):
    return goldens.tensors("units")


def table(units, grid, dtype):
    return rotations(units[f"in/{GRIDS[grid]}"].to(dtype), *map(int, grid.split("x")), CPU).table()


@pytest.mark.parametrize("grid", ("2x3x5", "1x30x53", "3x4x4"))
def test_positions(goldens, units, grid):
    positions = torch.cartesian_prod(*axis_positions(*map(int, grid.split("x"))))
    goldens.check(positions, units[f"out_f64/rope_pos_{grid}"], f"unit/rope_pos_{grid}")


@pytest.mark.parametrize("grid", GRIDS)
def test_cosines_and_sines(goldens, units, dtype, grid):
    turns = table(units, grid, dtype)
    goldens.check(turns.real, units[f"out_f64/rope_cos_{grid}"], f"unit/rope_cos_{grid}")
    goldens.check(turns.imag, units[f"out_f64/rope_sin_{grid}"], f"unit/rope_sin_{grid}")


def test_rotation(goldens, units, dtype):
    out = rotate(units["in/rope_q"].to(dtype), table(units, "2x3x5", dtype)[None])
    goldens.check(out, units["out_f64/rope_applied_2x3x5"], "unit/rope_applied_2x3x5")


def test_the_product_of_three_turns_is_exact_even_for_a_long_clip():
    """In float32, angles of hundreds of radians would be off by about 1e-5."""
    frequencies = torch.rand(3, 1, 4, generator=torch.Generator().manual_seed(0)) * 3
    grid = (40, 30, 53)
    angles = torch.cartesian_prod(*axis_positions(*grid)) @ frequencies.double().flatten(1)
    turns = rotations(frequencies, *grid, CPU).table()[:, 0]
    assert turns.dtype == torch.complex64
    torch.testing.assert_close(turns, torch.polar(torch.ones_like(angles), angles).cfloat(), rtol=0, atol=4e-7)


def test_rotation_of_halves_is_made_in_float32(units):
    half = units["in/rope_q"].bfloat16()
    out = rotate(half, table(units, "2x3x5", torch.float32)[None])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, rotate(half.float(), table(units, "2x3x5", torch.float32)[None]))


def test_any_picture_covers_the_same_area():
    for rows, columns in ((30, 53), (4, 4), (1, 1), (7, 90)):
        _, row, column = axis_positions(1, rows, columns)
        spread = 192 / (rows * columns) ** 0.5
        assert row.sum().abs() < 1e-9 and column.sum().abs() < 1e-9
        assert (row.max() - row.min()).item() == pytest.approx((rows - 1) * spread)
        assert (column.max() - column.min()).item() == pytest.approx((columns - 1) * spread)
