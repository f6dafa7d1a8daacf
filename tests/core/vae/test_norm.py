import pytest
import torch
from torch import nn

from mochi_core.vae.norm import per_frame

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def norm(goldens, dtype):
    units = goldens.tensors("units")
    norm = nn.GroupNorm(32, 32, dtype=dtype)
    norm.load_state_dict({"weight": units["in/gn_w"], "bias": units["in/gn_b"]})
    return norm


@pytest.mark.parametrize("suffix", ("", "_tiny"))
def test_against_the_reference(goldens, dtype, norm, suffix):
    units = goldens.tensors("units")
    out = per_frame(norm, units[f"in/gn_x{suffix}"].to(dtype))
    goldens.check(out, units[f"out_f64/groupnorm_spatial{suffix}"], f"unit/groupnorm_spatial{suffix}")


def test_no_frame_can_tell_what_others_hold(goldens, dtype, norm):
    x = goldens.tensors("units")["in/gn_x"].to(dtype)
    changed = x.clone()
    changed[:, :, 1] *= 7
    before, after = per_frame(norm, x), per_frame(norm, changed)
    assert torch.equal(before[:, :, ::2], after[:, :, ::2])
