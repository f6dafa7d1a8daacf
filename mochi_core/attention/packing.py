"""Ragged batches for kernels that take no mask, or are slow with one: each sample's valid keys, without padding.

Queries stay as they are: the few masked ones cost less than moving all of them twice.

Shapes: `B` batch, `A` heads, `N` tokens, `n` valid tokens of one sample, `D` head width.
"""

from collections.abc import Callable

import torch

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


def valid_keys(k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> list[KeysAndValues]:
    """The valid keys and values of each sample, both `1 A n D`: views where valid tokens come first, else copies.

    A sample without a valid key keeps its first one, so that no kernel meets an empty sequence.
    """
    if key_mask is None:
        return list(zip(k.split(1), v.split(1)))
    counts = key_mask.sum(1)
    first = torch.arange(key_mask.shape[1], device=key_mask.device) < counts[:, None]
    # One wait for the device, whatever the batch.
    samples = torch.stack([counts, (key_mask == first).all(1)], dim=1).tolist()
    keys = []
    for index, (count, valid_come_first) in enumerate(samples):
        own_k, own_v = k[index : index + 1], v[index : index + 1]
        if valid_come_first:
            keys.append((own_k[:, :, : max(count, 1)], own_v[:, :, : max(count, 1)]))
        else:
            valid = key_mask[index].nonzero()[:, 0]
            keys.append((own_k.index_select(2, valid), own_v.index_select(2, valid)))
    return keys


def each_sample(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """`attend(q, k, v)` with a mask: one call when every key is valid, else one a sample with its valid keys."""
    if key_mask is None:
        return attend(q, k, v)
    keys = valid_keys(k, v, key_mask)
    if all(own_k.shape[2] == k.shape[2] for own_k, _ in keys):
        return attend(q, k, v)
    return torch.cat([attend(own_q, own_k, own_v) for own_q, (own_k, own_v) in zip(q.split(1), keys)])
