import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mochi_core.dit.layers import FinalLayer, GatedMLP, gated_residual, modulated_rms_norm

PRECISIONS = (torch.float32, torch.bfloat16)


@pytest.fixture
def units(goldens, no_gradients):
    return goldens.tensors("units")


def weights(units, module, dtype):
    return {k.removeprefix(f"w/{module}/"): v.to(dtype) for k, v in units.items() if k.startswith(f"w/{module}/")}


def tokens(*shape, precision=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(precision)


class TestAgainstTheReference:
    def test_modulated_norm(self, goldens, units, dtype):
        out = modulated_rms_norm(units["in/mod_x"].to(dtype), units["in/mod_scale"].to(dtype))
        goldens.check(out, units["out_f64/modulated_rmsnorm"], "unit/modulated_rmsnorm")

    def test_modulated_norm_of_tiny_values(self, goldens, units, dtype):
        out = modulated_rms_norm(units["in/mod_tiny_x"].to(dtype), units["in/mod_scale"][:1].to(dtype))
        goldens.check(out, units["out_f64/modulated_rmsnorm_tiny"], "unit/modulated_rmsnorm_tiny")

    def test_gated_residual(self, goldens, units, dtype):
        out = gated_residual(*(units[f"in/{name}"].to(dtype) for name in ("res_x", "res_xres", "res_gate")))
        goldens.check(out, units["out_f64/residual_tanh_gated_rmsnorm"], "unit/residual_tanh_gated_rmsnorm")

    def test_gated_residual_of_tiny_values(self, goldens, units, dtype):
        x, branch, gate = units["in/res_x"][:1, :3], units["in/mod_tiny_x"], units["in/res_gate"][:1]
        out = gated_residual(x.to(dtype), branch.to(dtype), gate.to(dtype))
        goldens.check(out, units["out_f64/residual_tanh_gated_rmsnorm_tiny"], "unit/residual_tanh_gated_rmsnorm_tiny")

    def test_gated_mlp(self, goldens, units, dtype):
        mlp = GatedMLP(20, 256, nn, dtype=dtype)
        mlp.load_state_dict(weights(units, "feed_forward", dtype))
        goldens.check(mlp(units["in/ff_x"].to(dtype)), units["out_f64/feed_forward"], "unit/feed_forward")

    @pytest.mark.parametrize("suffix", ("", "_tiny"))
    def test_final_layer(self, goldens, units, dtype, suffix):
        layer = FinalLayer(16, 12, nn, dtype=dtype)
        layer.load_state_dict(weights(units, "final", dtype))
        out = layer(units[f"in/final_x{suffix}"].to(dtype), units["in/final_c"].to(dtype))
        goldens.check(out, units[f"out_f64/final_layer{suffix}"], f"unit/final_layer{suffix}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_norm_and_gate_are_computed_wide(precision):
    x, branch, vector = tokens(2, 9, 16, precision=precision), tokens(2, 9, 16, seed=1), tokens(2, 16, seed=2)
    branch, vector = branch.to(precision), vector.to(precision)
    wide_x, wide_branch, wide_vector = (t.double() for t in (x, branch, vector))
    normed = F.rms_norm(wide_x, (16,), eps=1e-6) * (1 + wide_vector[:, None])
    gated = wide_x + F.rms_norm(wide_branch, (16,), eps=1e-6) * wide_vector[:, None].tanh()
    tolerance = dict(rtol=1e-5, atol=1e-6) if precision == torch.float32 else dict(rtol=1.6e-2, atol=1e-2)
    torch.testing.assert_close(modulated_rms_norm(x, vector).double(), normed, **tolerance)
    torch.testing.assert_close(gated_residual(x, branch, vector).double(), gated, **tolerance)
