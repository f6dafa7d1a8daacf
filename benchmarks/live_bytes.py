"""Bytes that tensors keep alive, counted from the operation that made them to their last reference.

Works on tensors without memory too: under torch's `FakeTensorMode` a forward of any size, on a device that is not
here, counts in seconds. `FakeTensorMode` goes outside, `LiveBytes` inside.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of storages made under this mode: alive now, and the most at once; of all devices, and of each kind.

    Counted is what tensors hold. What a kernel takes inside itself, and what an allocator rounds up, is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.now_on: defaultdict[str, int] = defaultdict(int)
        self.peak_on: defaultdict[str, int] = defaultdict(int)
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What comes from before this mode weighs nothing, also where an operation returns a view of it, or it itself.
        for tensor in _tensors(args, kwargs):
            self._count(tensor.untyped_storage(), tensor.device.type, 0)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            self._count(storage, tensor.device.type, storage.nbytes())
        return out

    def take_peak(self, device: str) -> int:
        """The most at once on a kind of device since this was asked last; counting it goes on from what is alive."""
        peak, self.peak_on[device] = self.peak_on[device], self.now_on[device]
        return peak

    def _count(self, storage: torch.UntypedStorage, device: str, size: int) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.now_on[device] += size
        self.peak = max(self.peak, self.now)
        self.peak_on[device] = max(self.peak_on[device], self.now_on[device])

        def gone() -> None:
            self.known.discard(key)
            self.now -= size
            self.now_on[device] -= size

        weakref.finalize(storage, gone)


def _tensors(*values: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
