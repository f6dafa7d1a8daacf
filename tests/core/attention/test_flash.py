"""The adapter to each package, with functions that have the package's signature and compute the formula."""

import inspect
import logging
import sys

import pytest
import torch

from mochi_core.attention import flash, nvidia
from mochi_core.attention.joint import QKV, PlainJointAttention
from mochi_core.attention.kernels import TOLERANCE, check_kernel, exact_kernels, get_kernel, self_check
from mochi_core.attention.reference import attend as reference
from mochi_core.errors import KernelError

pytestmark = pytest.mark.usefixtures("no_gradients", "fresh_choices")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF = (torch.float16, torch.bfloat16)


def by_the_formula(q, k, v, q_offsets, k_offsets, longest_q, longest_k):
    """Every sequence of a packed batch by itself, after a look at all that a package would check."""
    assert {x.dtype for x in (q, k, v)} <= {*HALF} and len({x.dtype for x in (q, k, v)}) == 1
    assert k.shape == v.shape and q.shape[1:] == k.shape[1:] and q.ndim == 3
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for offsets, tokens, longest in ((q_offsets, q, longest_q), (k_offsets, k, longest_k)):
        assert offsets.dtype == torch.int32 and offsets.is_contiguous() and offsets.device == q.device
        lengths = offsets.diff()
        assert offsets[0] == 0 and offsets[-1] == len(tokens) and (lengths > 0).all()
        assert type(longest) is int and longest == lengths.max()
    assert len(q_offsets) == len(k_offsets)
    outs = []
    for index in range(len(q_offsets) - 1):
        rows = slice(q_offsets[index], q_offsets[index + 1]), slice(k_offsets[index], k_offsets[index + 1])
        own = (x[rows[x is not q]].transpose(0, 1)[None] for x in (q, k, v))
        outs.append(reference(*own)[0].transpose(0, 1))
    return torch.cat(outs)


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert dropout_p == 0 and softmax_scale is None and not causal and not return_attn_probs
    return by_the_formula(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    **_,
):
    assert seqused_q is None and seqused_k is None and softmax_scale is None and not causal
    return by_the_formula(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def early_flash_attn_3(*arguments, **named):
    return flash_attn_3(*arguments, **named), torch.zeros(0)


def flash_attn_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    **_,
):
    assert qv is None and seqused_q is None and page_table is None and softmax_scale is None and not causal
    return by_the_formula(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert not is_causal and return_aux is None
    return by_the_formula(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, **_):
    assert scale is None and return_aux is None
    return by_the_formula(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


PACKAGES = {
    "flash-attn 2": {"flash_attn": {"flash_attn_varlen_func": flash_attn_2}},
    "flash-attn 3": {"flash_attn_interface": {"flash_attn_varlen_func": flash_attn_3}},
    "early flash-attn 3": {"flash_attn_interface": {"flash_attn_varlen_func": early_flash_attn_3}},
    "flash-attn 4": {"flash_attn.cute": {"flash_attn_varlen_func": flash_attn_4}},
    "torch 2.10": {"torch.nn.attention.varlen": {"varlen_attn": torch_2_10}},
    "torch": {"torch.nn.attention.varlen": {"varlen_attn": torch_2_11}},
}


@pytest.fixture
def any_package(packages, pretend_capability):
    """Some package on a Hopper."""
    pretend_capability(9, 0)
    packages(**PACKAGES["flash-attn 3"])


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("precision", HALF, ids=str)
def test_every_package_computes_attention(packages, pretend_capability, inputs, mask, package, precision):
    packages(**PACKAGES[package])
    pretend_capability(9, 0)
    kernel = get_kernel("flash", CPU, precision)
    assert self_check(kernel, CPU, precision) <= TOLERANCE[precision]
    q, k, v = inputs(precision)
    for key_mask in (None, mask):
        out = kernel(q, k, v, key_mask)
        assert out.shape == q.shape and out.dtype == precision
        expected = reference(q.float(), k.float(), v.float(), key_mask)
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=TOLERANCE[precision])


def test_torchs_own_is_called_as_it_is_declared_here(monkeypatch, pretend_capability, packages, inputs, mask):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)
    calls = []

    def declared(*arguments, **named):
        bound = signature.bind(*arguments, **named).arguments
        calls.append(set(bound))
        return by_the_formula(*bound.values())

    packages(**{"torch.nn.attention.varlen": {"varlen_attn": declared}})
    pretend_capability(8, 6)
    q, k, v = inputs(torch.bfloat16)
    out = get_kernel("flash", CPU, torch.bfloat16)(q, k, v, mask)
    torch.testing.assert_close(out, reference(q, k, v, mask), rtol=0, atol=TOLERANCE[torch.bfloat16])
    assert calls == [{"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"}]


def test_no_padding_is_packed(monkeypatch, any_package, inputs, mask):
    totals = []

    def counted(q, k, v, **named):
        totals.append((len(q), len(k), len(v)))
        return flash_attn_3(q, k, v, **named)

    monkeypatch.setattr("flash_attn_interface.flash_attn_varlen_func", counted)
    get_kernel("flash", CPU, torch.bfloat16)(*inputs(torch.bfloat16), mask)
    assert totals == [(mask.numel(), mask.sum(), mask.sum())]


def test_one_sample_is_not_copied(monkeypatch, any_package, inputs):
    q, k, v = (x[:1] for x in inputs(torch.bfloat16))
    pointers = []

    def watched(q, k, v, **named):
        pointers.extend(x.data_ptr() for x in (q, k, v))
        return flash_attn_3(q, k, v, **named)

    monkeypatch.setattr("flash_attn_interface.flash_attn_varlen_func", watched)
    get_kernel("flash", CPU, torch.bfloat16)(q, k, v, torch.arange(9)[None] < 6)
    assert pointers == [x.data_ptr() for x in (q, k, v)]


def test_a_sample_without_valid_keys_is_finite(any_package, inputs, mask):
    q, k, v = inputs(torch.bfloat16)
    empty = torch.cat([mask[:3], torch.zeros_like(mask[:1])])
    out = get_kernel("flash", CPU, torch.bfloat16)(q, k, v, empty)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:3], reference(q, k, v, mask)[:3], rtol=0, atol=TOLERANCE[torch.bfloat16])


def test_a_ragged_batch_is_each_prompt_alone(any_package):
    generator = torch.Generator().manual_seed(0)

    def stream(tokens):
        return QKV(*(torch.randn(2, tokens, 3, 16, generator=generator).bfloat16() for _ in range(3)))

    visual, text = stream(11), stream(5)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    together, _ = PlainJointAttention("flash")(visual, text, mask)
    for index, valid in enumerate((5, 2)):
        own_visual, own_text = (QKV(*(x[index : index + 1] for x in qkv)) for qkv in (visual, text))
        own_text = QKV(*(x[:, :valid] for x in own_text))
        alone, _ = PlainJointAttention("flash")(own_visual, own_text, None)
        assert torch.equal(together[index : index + 1], alone)


# Which package


@pytest.mark.parametrize(
    "capability, order",
    (
        ((8, 0), ("flash-attn 2", "torch")),
        ((8, 9), ("flash-attn 2", "torch")),
        ((9, 0), ("flash-attn 3", "flash-attn 4", "flash-attn 2", "torch")),
        ((10, 0), ("flash-attn 4", "flash-attn 2", "torch")),
        ((12, 0), ("flash-attn 2", "torch")),
    ),
)
def test_the_device_and_what_is_installed_choose_the_package(packages, pretend_capability, capability, order):
    pretend_capability(*capability)
    for position, expected in enumerate(order):
        flash.provider_for.cache_clear()
        packages(**{module: content for name in order[position:] for module, content in PACKAGES[name].items()})
        assert flash.provider_for(CUDA)[0] == expected


@pytest.mark.parametrize(
    "failure",
    (
        'ImportError("no module named flash_attn_2_cuda")',
        'OSError("libcudart.so.12: cannot open shared object file")',
        'RuntimeError("operator already registered")',
        'AttributeError("module torch has no attribute x")',
        'AssertionError("Unsupported compute capability")',
    ),
)
def test_a_package_that_breaks_while_it_is_imported_is_passed_over(
    monkeypatch, tmp_path, caplog, packages, pretend_capability, failure
):
    pretend_capability(9, 0)
    packages(**PACKAGES["flash-attn 2"])
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    (tmp_path / "flash_attn_interface.py").write_text(f"raise {failure}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level(logging.DEBUG, "mochi_core"):
        assert flash.provider_for(CUDA)[0] == "flash-attn 2"
    assert f"flash attention from flash-attn 3 is not available: {failure.split('(')[0]}" in caplog.text
    assert "flash attention on cuda:0 (compute capability 9.0): flash-attn 2" in caplog.text


def test_a_package_without_the_function_is_passed_over(packages, pretend_capability):
    pretend_capability(8, 6)
    packages(**{"flash_attn": {}, **PACKAGES["torch"]})
    assert flash.provider_for(CUDA)[0] == "torch"


# What it says when it cannot run


def test_no_package_at_all(packages, pretend_capability):
    pretend_capability(8, 6)
    packages()
    message = (
        r"no package here provides it \(flash-attn 2: .*; torch: .*\): on compute capability 8.6 it comes from one of"
    )
    with pytest.raises(KernelError, match=message + r".*flash-attn 2, torch\. Update torch .*pip install flash-attn"):
        get_kernel("flash", CUDA, torch.bfloat16)
    with pytest.raises(KernelError, match=message):
        check_kernel("flash", CUDA)


@pytest.mark.parametrize("precision", (torch.float32, torch.float64), ids=str)
def test_full_precision(any_package, precision):
    with pytest.raises(
        KernelError, match=rf"'flash' in {precision}: flash computes in float16 or bfloat16 only\. Load"
    ):
        get_kernel("flash", CUDA, precision)
    check_kernel("flash", CUDA)


def test_other_devices(packages):
    packages(**PACKAGES["flash-attn 2"])
    with pytest.raises(KernelError, match=r"^attention is 'flash' on cpu: flash needs an NVIDIA device .*\. Choose"):
        get_kernel("flash", CPU, torch.bfloat16)


def test_old_devices(packages, pretend_capability):
    packages(**PACKAGES["flash-attn 2"])
    pretend_capability(7, 5)
    with pytest.raises(
        KernelError, match=r"^attention is 'flash' on cuda:0 of compute capability 7.5: .* 8.0 or newer"
    ):
        check_kernel("flash", CUDA)


def test_amds_devices_are_not_nvidias(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert nvidia.capability(CUDA) is None


# Whether auto takes it first


def test_auto_takes_it_first_with_3_on_a_hopper(packages, pretend_capability):
    packages(**PACKAGES["flash-attn 3"], **PACKAGES["flash-attn 2"])
    pretend_capability(9, 0)
    assert exact_kernels(CUDA) == ("flash", "sdpa", "reference")


@pytest.mark.parametrize("capability", ((7, 5), (8, 9), (9, 0), (10, 0), (12, 0)))
def test_auto_takes_sdpa_first_elsewhere(packages, pretend_capability, capability):
    pretend_capability(*capability)
    packages()
    assert exact_kernels(CUDA) == ("sdpa", "flash", "reference")
    flash.provider_for.cache_clear()
    packages(**PACKAGES["flash-attn 4"], **PACKAGES["flash-attn 2"])
    assert exact_kernels(CUDA) == ("sdpa", "flash", "reference")
