import pytest
import torch

from mochi_core.numerics import widen


@pytest.mark.parametrize(
    "given, wide",
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_widen(given, wide):
    assert widen(torch.ones(1, dtype=given)).dtype == wide
