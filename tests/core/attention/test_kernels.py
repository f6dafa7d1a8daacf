import logging
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
ANYWHERE = ("reference", "sdpa")


@pytest.fixture
def only_kernels(monkeypatch, fresh_choices):
    """`only_kernels(name=function, ...)`: makes these the exact kernels, in this order."""

    def replace(**functions):
        for name, function in functions.items():
            module = ModuleType(f"mochi_core.attention.{name}")
            module.attend = function
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(kernels, "KERNELS", tuple(functions))
        monkeypatch.setattr(kernels, "exact_kernels", lambda device: tuple(functions))

    return replace


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


@pytest.mark.parametrize("name", ANYWHERE)
@pytest.mark.parametrize("precision", sorted(kernels.TOLERANCE, key=str))
def test_every_kernel_agrees_with_the_reference(name, precision):
    kernel = kernels.get_kernel(name, CPU, precision)
    assert kernels.self_check(kernel, CPU, precision) <= kernels.TOLERANCE[precision]
    q, k, v = attention_inputs(precision)
    assert kernel(q, k, v).dtype == precision and kernel(q, k, v).shape == q.shape


@pytest.mark.parametrize("name", ANYWHERE)
def test_masked_keys_have_no_influence(name):
    kernel = kernels.get_kernel(name, CPU, torch.float32)
    q, k, v = attention_inputs(torch.float32)
    mask = torch.tensor([[True] * 6 + [False] * 3, [False] * 8 + [True]])
    out = kernel(q, k, v, mask)
    torch.testing.assert_close(out[:1], kernel(q[:1], k[:1, :, :6], v[:1, :, :6]), rtol=0, atol=1e-6)
    torch.testing.assert_close(out[1:], v[1:, :, -1:].expand_as(q[1:]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ("flash9000", "", "AUTO"))
def test_unknown_kernel(name):
    with pytest.raises(
        KernelError, match=rf"attention is '{name}': it must be one of auto, flash, reference, sage, sdpa\. Choose"
    ):
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
    assert calls == [torch.float32] * 3 + [torch.bfloat16] * 3


def test_a_kernel_asked_for_by_name_is_not_second_guessed(only_kernels):
    only_kernels(broken=off, good=reference)
    assert kernels.get_kernel("broken", CPU, torch.float32) is off


@pytest.mark.parametrize("name", ANYWHERE)
def test_a_sample_without_valid_keys_is_finite(name):
    q, k, v = attention_inputs(torch.float32)
    mask = torch.tensor([[True] * 9, [False] * 9])
    out = kernels.get_kernel(name, CPU, torch.float32)(q, k, v, mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], reference(q, k, v)[0], rtol=0, atol=1e-6)


def test_auto_passes_over_what_cannot_run_here_and_says_why(only_kernels, monkeypatch, caplog):
    only_kernels(picky=off, good=reference)

    def require(device, dtype):
        raise KernelError("picky on a cpu", "it cannot be", "Choose auto")

    monkeypatch.setattr(sys.modules["mochi_core.attention.picky"], "require", require, raising=False)
    with caplog.at_level(logging.INFO, "mochi_core"):
        assert kernels.get_kernel("auto", CPU, torch.float32) is reference
    assert "attention kernel picky passed over: picky on a cpu: it cannot be" in caplog.text
    assert "attention: good on cpu in torch.float32" in caplog.text
    with pytest.raises(KernelError, match="picky on a cpu"):
        kernels.get_kernel("picky", CPU, torch.float32)


def test_the_self_check_sees_one_masked_key():
    def attends_to_one_more(q, k, v, key_mask=None):
        if key_mask is not None:
            key_mask = key_mask | (key_mask.cumsum(1) == key_mask.sum(1, keepdim=True)).roll(1, dims=1)
        return reference(q, k, v, key_mask)

    assert kernels.self_check(attends_to_one_more, CPU, torch.float32) > kernels.TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", ("auto", *ANYWHERE))
def test_check_kernel_says_nothing_about_what_runs_anywhere(name):
    kernels.check_kernel(name, CPU)
    kernels.check_kernel(name, CPU, torch.float32)


def test_check_kernel_knows_the_names():
    with pytest.raises(KernelError, match="attention is 'magic'"):
        kernels.check_kernel("magic", CPU)


def test_the_order_on_a_cpu():
    assert kernels.exact_kernels(CPU) == ("sdpa", "reference")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", ("auto", "reference", "sdpa", "flash"))
@pytest.mark.parametrize("precision", sorted(kernels.TOLERANCE, key=str))
def test_every_exact_kernel_agrees_with_the_reference_on_a_gpu(name, precision):
    device = torch.device("cuda", 0)
    try:
        kernel = kernels.get_kernel(name, device, precision)
    except KernelError as reason:
        pytest.skip(str(reason))
    assert kernels.self_check(kernel, device, precision) <= kernels.TOLERANCE[precision]
