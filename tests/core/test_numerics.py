import pytest
import torch
from torch.nn import functional as F

from mochi_core.numerics import CPU_CACHE_VALUES, silu, silu_, widen

MANY = 3 * CPU_CACHE_VALUES + 5
PRECISIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def values(count, precision=torch.float32):
    return (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 8).to(precision)


@pytest.mark.parametrize(
    "given, wide",
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_widen(given, wide):
    assert widen(torch.ones(1, dtype=given)).dtype == wide


@pytest.mark.usefixtures("no_gradients")
class TestWithoutGradients:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_silu_is_torchs_to_a_rounding(self, precision):
        x = values(MANY, precision)
        assert silu(x).dtype == widen(x).dtype
        tolerance = 1e-14 if precision == torch.float64 else 5e-7
        torch.testing.assert_close(silu(x).double(), F.silu(x.double()), rtol=tolerance, atol=1e-30)

    def test_silu_leaves_its_input_alone(self):
        x = values(10)
        silu(x)
        assert torch.equal(x, values(10))

    def test_silu_of_extremes(self):
        x = torch.tensor([-1e30, -200.0, -100.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30, float("inf")])
        torch.testing.assert_close(silu(x), F.silu(x), rtol=1e-6, atol=1e-35)

    def test_silu_keeps_nan(self):
        assert silu(torch.tensor([float("nan")])).isnan().all()

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_in_place_is_the_same_rounded(self, precision):
        x = values(MANY, precision)
        expected = silu(x).to(precision)
        assert silu_(x) is x
        assert torch.equal(x, expected)

    @pytest.mark.parametrize("shape", [(2, 8, 3, 40, 50), (1, 1, 1, 1, 1), (0, 8, 1, 2, 2)])
    def test_in_place_in_any_memory_layout(self, shape):
        plain = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        wider = torch.zeros(*shape[:-1], shape[-1] + 3)
        wider[..., :-3] = plain
        for x in (plain.contiguous(memory_format=torch.channels_last_3d), plain.transpose(1, 3), wider[..., :-3]):
            expected = silu(x)
            assert torch.equal(silu_(x), expected)
        assert not wider[..., -3:].any()

    def test_in_place_on_a_part_leaves_the_rest(self):
        whole = values(30)
        silu_(whole[10:20])
        assert torch.equal(whole[:10], values(30)[:10]) and torch.equal(whole[20:], values(30)[20:])


class TestWithGradients:
    def test_silu_is_torchs_own(self):
        x, reference = values(100).requires_grad_(), values(100).requires_grad_()
        silu(x).sum().backward()
        F.silu(reference).sum().backward()
        assert torch.equal(silu(x), F.silu(reference))
        assert torch.equal(x.grad, reference.grad)

    def test_in_place_lets_gradients_through(self):
        x, reference = values(100).requires_grad_(), values(100).requires_grad_()
        silu_(x * 1).sum().backward()
        F.silu(reference).sum().backward()
        assert torch.equal(x.grad, reference.grad)
