"""The LoRA in training: its gradient, its neutrality at the start, and the file it becomes."""

import json

import pytest
import torch
from safetensors import safe_open

from mochi_core.config import DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.errors import TrainingError
from mochi_core.training.lora import LoraOptions, Rank, TrainableLora
from mochi_core.weights.lora import attached, branches
from mochi_core.weights.lora_file import read_lora
from mochi_core.weights.quantized import QuantizedLinear, quantize_linears

CONFIG = DiTConfig(depth=2, heads=4, visual_dim=64, text_dim=32, text_feature_dim=16)
ALL = LoraOptions(Rank(4, 8), Rank(3, 6), Rank(2), Rank(2, 1))


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = AsymmDiT(CONFIG, dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.5 / parameter.shape[-1] ** 0.5))
    return made.requires_grad_(False).eval()


def inputs(dtype=torch.float64):
    torch.manual_seed(1)
    text = torch.randn(2, 5, 16, dtype=dtype), torch.tensor([[True] * 5, [True, True, False, False, False]])
    return torch.randn(2, 12, 2, 4, 4, dtype=dtype), torch.tensor([0.3, 0.8]), *text


def with_values(lora):
    """As after some training: `up` is not zero any more."""
    with torch.no_grad():
        for index, up in enumerate(lora.up.values()):
            up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
    return lora


def test_begins_as_nothing(network):
    lora = TrainableLora(network, ALL)
    plain = network(*inputs())
    with lora.attached(network):
        assert torch.equal(network(*inputs()), plain)
    assert all(parameter.dtype == torch.float32 for parameter in lora.parameters())


def test_detaches_without_a_trace(network):
    lora = with_values(TrainableLora(network, ALL))
    plain = network(*inputs())
    with lora.attached(network):
        assert not torch.allclose(network(*inputs()), plain)
    assert torch.equal(network(*inputs()), plain)
    assert not any(layer._forward_hooks for layer in network.modules())


def test_which_layers(network):
    names = set(TrainableLora(network, LoraOptions(Rank(4), Rank(0))).ranks)
    assert names == {f"blocks.{i}.attn.qkv_{s}" for i in (0, 1) for s in "xy"}
    names = set(TrainableLora(network, LoraOptions(Rank(0), Rank(4))).ranks)
    # The last block does not update the text.
    assert names == {"blocks.0.attn.proj_x", "blocks.0.attn.proj_y", "blocks.1.attn.proj_x"}
    with pytest.raises(TrainingError, match="no layer"):
        TrainableLora(network, LoraOptions(Rank(0), Rank(0)))


def test_gradient_equals_finite_differences(network):
    """Of every factor, in float64, along random directions."""
    lora = with_values(TrainableLora(network, ALL)).double()
    target = torch.randn(2, 12, 2, 4, 4, dtype=torch.float64)

    def loss():
        return (network(*inputs()) - target).square().mean()

    with lora.attached(network):
        loss().backward()
        for name, parameter in lora.named_parameters():
            direction = torch.randn(parameter.shape, dtype=torch.float64)
            slope = (parameter.grad * direction).sum().item()
            with torch.no_grad():
                step = 1e-5
                parameter.add_(direction, alpha=step)
                above = loss().item()
                parameter.add_(direction, alpha=-2 * step)
                below = loss().item()
                parameter.add_(direction, alpha=step)
            assert slope == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-9), name
            assert abs(slope) > 1e-9 or "proj_y" in name or "_y" in name


def test_frozen_network_gets_no_gradient(network):
    lora = with_values(TrainableLora(network, ALL))
    with lora.attached(network):
        network(*inputs()).sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in lora.parameters())


@pytest.mark.parametrize(
    "options", [ALL, LoraOptions(Rank(4, 8), Rank(2, 1), rslora=True), LoraOptions(Rank(4), Rank(2))]
)
def test_file_is_what_was_trained(network, options, tmp_path):
    """Our reader makes the same network of it, whatever alpha was."""
    lora = with_values(TrainableLora(network, options))
    lora.write(tmp_path / "a.safetensors", {"note": "mine"})
    with lora.attached(network):
        trained = network(*inputs())
    with attached(network, branches([(read_lora(tmp_path / "a.safetensors", network), 1.0)])):
        torch.testing.assert_close(network(*inputs()), trained, rtol=1e-6, atol=1e-7)


def test_file_is_genmos(network, tmp_path):
    """Names, and metadata by which genmo's own code builds the layers; alpha = rank, for who does not read it."""
    lora = with_values(TrainableLora(network, LoraOptions(Rank(4, 8), Rank(3, 6, 0.25))))
    lora.write(tmp_path / "a.safetensors", {"note": "mine"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{name}.lora_{half}" for name in lora.ranks for half in "AB"}
        said = json.loads(file.metadata()["kwargs"])
        assert file.metadata()["note"] == "mine"
        assert file.get_tensor("blocks.0.attn.qkv_x.lora_A").shape == (4, 64)
        assert file.get_tensor("blocks.0.attn.qkv_x.lora_B").shape == (192, 4)
        up = lora.up["blocks-0-attn-qkv_x"].detach()
        torch.testing.assert_close(file.get_tensor("blocks.0.attn.qkv_x.lora_B"), up * 2)
    assert said == {
        "qkv_proj_lora_rank": 4,
        "qkv_proj_lora_alpha": 4,
        "qkv_proj_lora_dropout": 0.0,
        "out_proj_lora_rank": 3,
        "out_proj_lora_alpha": 3,
        "out_proj_lora_dropout": 0.25,
    }


def test_goes_on_from_a_file(network, tmp_path):
    first = with_values(TrainableLora(network, LoraOptions(Rank(4, 8), Rank(3, 6))))
    first.write(tmp_path / "a.safetensors", {})
    start = str(tmp_path / "a.safetensors")
    again = TrainableLora(network, LoraOptions(Rank(4, 2), Rank(3, 6), start=start))
    with first.attached(network):
        wanted = network(*inputs())
    with again.attached(network):
        torch.testing.assert_close(network(*inputs()), wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(TrainingError, match="does not have the layers and ranks"):
        TrainableLora(network, LoraOptions(Rank(5), Rank(3), start=start))


def test_dropout_is_the_same_when_a_layer_runs_again(network):
    lora = with_values(TrainableLora(network, LoraOptions(Rank(4, dropout=0.5), Rank(0))))
    with lora.attached(network):
        lora.dropped = 7
        once, again = network(*inputs()), network(*inputs())
        lora.dropped = 8
        other = network(*inputs())
        lora.dropped = None
        without = network(*inputs())
    assert torch.equal(once, again) and not torch.equal(once, other) and not torch.equal(once, without)


def test_dropout_keeps_the_mean():
    lora = TrainableLora(one_layer(), LoraOptions(Rank(1, dropout=0.3), Rank(0)))
    lora.dropped = 1
    x = torch.ones(200_000, 1)
    kept = lora._with_dropout("blocks.0.attn.qkv_x", Rank(1, dropout=0.3), x)
    assert kept.mean().item() == pytest.approx(1, abs=0.01) and (kept == 0).float().mean().item() == pytest.approx(
        0.3, abs=0.01
    )


def one_layer():
    block = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"qkv_x": torch.nn.Linear(4, 4)})})
    return torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block])})


def test_seed_decides_the_start(network):
    down = [next(iter(TrainableLora(network, ALL, seed).down.values())) for seed in (1, 1, 2)]
    assert torch.equal(down[0], down[1]) and not torch.equal(down[0], down[2])


@pytest.mark.parametrize("format", ["fp8", "fp8_scaled", "q8_0", "q4_0"])
def test_beside_quantised_layers(network, format):
    """The gradient is that over the same weights as floats, and no unpacked weight is kept for it."""
    base = network.float()
    quantize_linears(base.blocks, format)
    floats = AsymmDiT(CONFIG)
    content = base.state_dict()
    for name, layer in base.named_modules():
        if isinstance(layer, QuantizedLinear):
            content = {key: held for key, held in content.items() if not key.startswith(f"{name}.s")}
            content[f"{name}.weight"] = layer.dequantized(torch.float32)
    floats.load_state_dict(content)
    floats.requires_grad_(False)
    gradients, kept = [], []
    for one in (base, floats):
        lora = with_values(TrainableLora(one, LoraOptions(Rank(4), Rank(4))))
        bytes_kept = {}

        def keep(tensor, held=bytes_kept):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with lora.attached(one), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            one(*inputs(torch.float32)).square().mean().backward()
        gradients.append([parameter.grad for parameter in lora.parameters()])
        kept.append(sum(bytes_kept.values()))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert kept[0] < kept[1]


@pytest.mark.parametrize(
    "bad", [dict(rank=-1), dict(rank=4, alpha=0.0), dict(rank=4, dropout=1.0), dict(rank=4, alpha=float("inf"))]
)
def test_ranks_that_cannot_be(bad):
    with pytest.raises(TrainingError):
        Rank(**bad)
