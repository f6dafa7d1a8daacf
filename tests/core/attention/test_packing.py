import pytest
import torch

from mochi_core.attention.packing import each_sample, valid_keys
from mochi_core.attention.reference import attend as reference

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_valid_keys_of_each_sample(inputs, mask):
    _, k, v = inputs(torch.float32)
    for index, (own_k, own_v) in enumerate(valid_keys(k, v, mask)):
        assert torch.equal(own_k, k[index : index + 1, :, mask[index]])
        assert torch.equal(own_v, v[index : index + 1, :, mask[index]])


def test_no_mask_keeps_every_key(inputs):
    _, k, v = inputs(torch.float32)
    keys = valid_keys(k, v, None)
    assert torch.equal(torch.cat([own for own, _ in keys]), k) and torch.equal(torch.cat([own for _, own in keys]), v)


def test_valid_tokens_that_come_first_are_not_copied(inputs, mask):
    _, k, v = inputs(torch.float32)
    keys = valid_keys(k, v, mask)
    shared = [own_k.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() for own_k, _ in keys]
    assert shared == [True, True, False, False]


def test_a_sample_without_valid_keys_keeps_one(inputs):
    _, k, v = inputs(torch.float32)
    keys = valid_keys(k, v, torch.zeros(len(k), 9, dtype=torch.bool))
    assert [own.shape[2] for own, _ in keys] == [1] * len(k)


def test_each_sample_is_the_mask(inputs, mask):
    q, k, v = inputs(torch.float64)
    out = each_sample(reference, q, k, v, mask)
    torch.testing.assert_close(out, reference(q, k, v, mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("full_mask", (None, torch.ones(4, 9, dtype=torch.bool)), ids=("no mask", "all valid"))
def test_a_full_batch_is_one_call(inputs, full_mask):
    q, k, v = inputs(torch.float32)
    calls = []

    def counted(*qkv):
        calls.append([len(x) for x in qkv])
        return reference(*qkv)

    assert torch.equal(each_sample(counted, q, k, v, full_mask), reference(q, k, v))
    assert calls == [[4, 4, 4]]
