"""Frames kept on the host: the same video, no more on the device than said."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.live_bytes import LiveBytes
from mochi_core.config import TINY
from mochi_core.memory import frames as module
from mochi_core.memory.copies import SideStream
from mochi_core.memory.frames import HostFrames
from mochi_core.vae import Decoder
from mochi_core.vae.causal_conv import KeptContext

pytestmark = pytest.mark.usefixtures("no_gradients")


class Late(SideStream):
    """Copies only when a ticket is waited for: who reads or frees too early gets the wrong bytes."""

    def __init__(self, device, *, synchronous=False):
        super().__init__(device, synchronous=synchronous)
        self.queue = []

    def copy(self, source, target):
        # Like a device's allocator: who lets go of it too early finds others' values in it.
        self.queue.append((source, target))

    def mark(self):
        self.queue.append(ticket := object())
        return ticket

    def wait(self, ticket):
        while ticket in self.queue:
            first = self.queue.pop(0)
            if isinstance(first, tuple):
                first[1].copy_(first[0])


def latents(count):
    return torch.randn(1, 12, count, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", (SideStream, Late))
@pytest.mark.parametrize("keep", (0, 60_000, 10**9))
@pytest.mark.parametrize("values", (10_000, 60_000, 10**9))
def test_the_same_video(tiny, monkeypatch, kind, keep, values):
    monkeypatch.setattr(module, "SideStream", kind)
    expected = torch.cat(list(tiny.decoder.stream(latents(4), context=KeptContext(values_at_once=values))), dim=2)
    context = KeptContext(HostFrames("cpu", keep), values)
    assert torch.equal(torch.cat(list(tiny.decoder.stream(latents(4), context=context)), dim=2), expected)


@pytest.mark.parametrize("kind", (SideStream, Late))
def test_layers_in_any_order(monkeypatch, kind):
    monkeypatch.setattr(module, "SideStream", kind)
    store, layers = HostFrames("cpu"), [nn.Identity() for _ in range(3)]
    held = {}
    for turn, order in enumerate([(0, 1, 2), (0, 1, 2), (2, 0, 1), (1, 1, 1), (0, 2, 2)]):
        for index in order:
            if index in held:
                taken = torch.cat(list(store.take(layers[index])), dim=2)
                assert torch.equal(taken, held[index])
            held[index] = torch.full((1, 2, 2, 3, 3), 10.0 * turn + index)
            store.put(layers[index], list(held[index].clone().split(1, dim=2)))


@pytest.mark.parametrize("pieces", (1, 3, 99))
def test_nothing_is_on_its_way_afterwards(tiny, monkeypatch, pieces):
    """What still came would be written over what the memory was given to next."""
    monkeypatch.setattr(module, "SideStream", Late)
    store = HostFrames("cpu")
    stream = tiny.decoder.stream(latents(3), context=KeptContext(store))
    for _ in zip(range(pieces), stream):
        pass
    stream.close()
    assert any(isinstance(item, tuple) for copies in (store._enter, store._leave) for item in copies.queue)
    store.close()
    assert not store._enter.queue and not store._leave.queue
    assert not store._kept and not store._parked


def test_copies_follow_what_they_copy(monkeypatch):
    """A frame that does not lie in one piece is copied by the device first."""
    order = []
    monkeypatch.setattr(module, "_dense", lambda frame, dense=module._dense: order.append("dense") or dense(frame))
    monkeypatch.setattr(SideStream, "follow", lambda self: order.append("follow"))
    HostFrames("cpu").put(nn.Identity(), [torch.zeros(1, 2, 1, 3, 8)[..., ::2]])
    assert order == ["dense", "follow"]


def test_the_largest_stay():
    store = HostFrames("cpu", keep_bytes=900)
    small, large = nn.Identity(), nn.Identity()
    for _ in range(3):
        for layer, values in ((small, 50), (large, 200)):
            if layer in store._sizes:
                store.take(layer)
            store.put(layer, [torch.zeros(1, 1, 1, 1, values)])
            assert store.kept_bytes <= 900
    assert list(store._kept) == [large]


@pytest.mark.parametrize("keep", (0, 150_000))
def test_what_is_on_the_device(keep):
    """Beside what is kept: a layer's own frames, those that leave, those that come."""
    with FakeTensorMode():
        decoder = Decoder(TINY.vae, device="cuda")
        z = torch.empty(1, 12, 4, 4, 6, device="cuda")

        def peak(store):
            with LiveBytes() as live:
                for _ in decoder.stream(z, context=KeptContext(store)):
                    pass
            return live.peak_on["cuda"]

        everything, ours = peak(None), peak(HostFrames("cuda", keep, synchronous=True))
    kept = sum(2 * 4 * 24 * pixels * width for pixels, width in ((1, 96 * 4), (4, 64 * 2), (16, 32 * 2), (64, 0)))
    largest = 2 * 4 * 24 * 16 * 32
    assert everything - kept < ours <= everything - kept + keep + 3 * largest


def test_frames_keep_how_they_lie_in_memory():
    store, layer = HostFrames("cpu"), nn.Identity()
    frame = torch.randn(1, 4, 3, 5, 2).movedim(-1, 1)
    store.put(layer, [frame])
    (back,) = store.take(layer)
    assert torch.equal(back, frame) and back.stride() == frame.stride()
