"""The adapter to SageAttention, with functions that have each version's signature and compute the formula."""

import sys

import pytest
import torch

from mochi_core.attention.kernels import TOLERANCE, check_kernel, exact_kernels, get_kernel, self_check
from mochi_core.attention.reference import attend as reference
from mochi_core.errors import KernelError

pytestmark = pytest.mark.usefixtures("no_gradients", "fresh_choices")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def by_the_formula(q, k, v, scale):
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] in (64, 128) and k.shape == v.shape
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    return reference(q * (scale * q.shape[-1] ** 0.5), k, v)


def version_1(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **_):
    assert tensor_layout == "HND" and not is_causal and smooth_k
    k -= k.mean(dim=2, keepdim=True)
    return by_the_formula(q, k, v, sm_scale)


def version_2(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **_):
    assert tensor_layout == "HND" and not is_causal and not return_lse
    return by_the_formula(q, k, v, sm_scale)


@pytest.fixture
def version(packages, pretend_capability):
    """`version(function)`: this is the package's, on a device that has it."""

    def install(function):
        pretend_capability(8, 9)
        packages(sageattention={"sageattn": function})

    return install


@pytest.mark.parametrize("function", (version_1, version_2), ids=lambda f: f.__name__)
@pytest.mark.parametrize("width", (16, 64, 96, 128))
def test_every_version_computes_attention(version, inputs, mask, function, width):
    version(function)
    kernel = get_kernel("sage", CPU, torch.float16)
    assert self_check(kernel, CPU, torch.float16) <= TOLERANCE[torch.float16]
    q, k, v = inputs(torch.float16, width)
    for key_mask in (None, mask):
        out = kernel(q, k, v, key_mask)
        assert out.shape == q.shape and out.dtype == q.dtype
        expected = reference(q.float(), k.float(), v.float(), key_mask)
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=TOLERANCE[torch.float16])


@pytest.mark.parametrize("width", (16, 64))
def test_the_keys_stay_as_they_were(version, inputs, mask, width):
    version(version_1)
    q, k, v = inputs(torch.float16, width)
    before = k.clone()
    for key_mask in (None, mask):
        get_kernel("sage", CPU, torch.float16)(q, k, v, key_mask)
        assert torch.equal(k, before)


def test_a_sample_without_valid_keys_is_finite(version, inputs, mask):
    version(version_2)
    out = get_kernel("sage", CPU, torch.float16)(*inputs(torch.float16), torch.zeros_like(mask))
    assert out.isfinite().all()


def test_wide_heads(version, inputs):
    version(version_2)
    with pytest.raises(KernelError, match=r"^attention is 'sage', and the heads are 160 wide: .* at most 128\. Choose"):
        get_kernel("sage", CPU, torch.float16)(*inputs(torch.float16, 160))


def test_it_is_never_autos(version):
    version(version_2)
    assert "sage" not in exact_kernels(CUDA) and "sage" not in exact_kernels(CPU)


def test_full_precision(version):
    version(version_1)
    with pytest.raises(KernelError, match=r"'sage' in torch.float32: sage computes in float16 or bfloat16 only\. Load"):
        get_kernel("sage", CUDA, torch.float32)
    check_kernel("sage", CUDA)


def test_other_devices(packages):
    packages(sageattention={"sageattn": version_1})
    with pytest.raises(KernelError, match=r"^attention is 'sage' on cpu: sage needs an NVIDIA device .*\. Choose"):
        check_kernel("sage", CPU)


def test_missing(packages, pretend_capability):
    pretend_capability(8, 9)
    packages()
    message = (
        r"^attention is 'sage', and sageattention cannot be imported \(.*\): .*\. pip install sageattention, or choose"
    )
    with pytest.raises(KernelError, match=message):
        get_kernel("sage", CUDA, torch.float16)


@pytest.mark.parametrize("failure", ("OSError", "RuntimeError", "AttributeError"))
def test_broken(monkeypatch, tmp_path, pretend_capability, failure):
    pretend_capability(8, 9)
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)
    (tmp_path / "sageattention.py").write_text(f'raise {failure}("built for another torch")\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KernelError, match=r"sageattention cannot be imported \(built for another torch\)"):
        check_kernel("sage", CUDA)
