import sys
from types import ModuleType

import pytest
import torch

from mochi_core.attention import kernels
from mochi_core.attention.reference import attend as reference
from mochi_core.errors import KernelError

pytestmark = pytest.mark.usefixtures("no_gradients")
CPU = torch.device("cpu")
NAN = float("nan")


@pytest.fixture
def only_kernels(monkeypatch):
    """`only_kernels(name=function, ...)`: makes these the exact kernels, in this order."""

    def replace(**functions):
        for name, function in functions.items():
            module = ModuleType(f"mochi_core.attention.{name}")
            module.attend = function
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(kernels, "KERNELS", {name: name for name in functions})
        monkeypatch.setattr(kernels, "EXACT", tuple(functions))
        kernels._auto.cache_clear()

    yield replace
    kernels._auto.cache_clear()


def attention_inputs(precision, tokens=9, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, tokens, 10, generator=generator).to(precision) for _ in range(3)]


def off(q, k, v, key_mask=None):
    return reference(q, k, v, key_mask) + 0.5


def deaf_to_the_mask(q, k, v, key_mask=None):
    return reference(q, k, v)


def nan_everywhere(q, k, v, key_mask=None):
    return reference(q, k, v, key_mask) * NAN


def nan_when_masked(q, k, v, key_mask=None):
    return reference(q, k, v, key_mask) * (1 if key_mask is None else NAN)


def crashing(q, k, v, key_mask=None):
    raise RuntimeError("no such device")


def test_reference_is_the_formula():
    q, k, v = attention_inputs(torch.float64, tokens=3)
    weights = torch.exp(torch.einsum("bhqd,bhkd->bhqk", q, k) / 10**0.5)
    expected = torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(reference(q, k, v), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
@pytest.mark.parametrize("precision", sorted(kernels.TOLERANCE, key=str))
def test_every_kernel_agrees_with_the_reference(name, precision):
    kernel = kernels.get_kernel(name, CPU, precision)
    assert kernels.self_check(kernel, CPU, precision) <= kernels.TOLERANCE[precision]
    q, k, v = attention_inputs(precision)
    assert kernel(q, k, v).dtype == precision and kernel(q, k, v).shape == q.shape


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
def test_masked_keys_have_no_influence(name):
    kernel = kernels.get_kernel(name, CPU, torch.float32)
    q, k, v = attention_inputs(torch.float32)
    mask = torch.tensor([[True] * 6 + [False] * 3, [False] * 8 + [True]])
    out = kernel(q, k, v, mask)
    torch.testing.assert_close(out[:1], kernel(q[:1], k[:1, :, :6], v[:1, :, :6]), rtol=0, atol=1e-6)
    torch.testing.assert_close(out[1:], v[1:, :, -1:].expand_as(q[1:]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ("flash9000", "", "AUTO"))
def test_unknown_kernel(name):
    with pytest.raises(KernelError, match=rf"attention is '{name}': it must be one of auto, reference, sdpa\. Choose"):
        kernels.get_kernel(name, CPU, torch.float32)


def test_auto_takes_the_fastest():
    assert kernels.get_kernel("auto", CPU, torch.float32) is kernels.get_kernel("sdpa", CPU, torch.float32)


@pytest.mark.parametrize("broken", (off, deaf_to_the_mask, nan_everywhere, crashing), ids=lambda f: f.__name__)
def test_auto_rejects_a_broken_kernel_and_says_so(only_kernels, caplog, broken):
    only_kernels(broken=broken, good=reference)
    assert kernels.get_kernel("auto", CPU, torch.float32) is reference
    assert "attention kernel broken" in caplog.text


def test_auto_rejects_a_kernel_that_is_nan_only_under_a_mask(only_kernels):
    only_kernels(broken=nan_when_masked, good=reference)
    assert kernels.get_kernel("auto", CPU, torch.float32) is reference


def test_auto_without_any_working_kernel(only_kernels):
    only_kernels(broken=off, worse=crashing)
    message = r"^No attention kernel works on cpu in torch.float32: .*reference.*\. Choose another dtype"
    with pytest.raises(KernelError, match=message):
        kernels.get_kernel("auto", CPU, torch.float32)


def test_auto_checks_once_for_each_dtype(only_kernels):
    calls = []

    def counted(q, k, v, key_mask=None):
        calls.append(q.dtype)
        return reference(q, k, v, key_mask)

    only_kernels(counted=counted)
    for precision in (torch.float32, torch.float32, torch.bfloat16, torch.float32):
        kernels.get_kernel("auto", CPU, precision)
    assert calls == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_a_kernel_asked_for_by_name_is_not_second_guessed(only_kernels):
    only_kernels(broken=off, good=reference)
    assert kernels.get_kernel("broken", CPU, torch.float32) is off
