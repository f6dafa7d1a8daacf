"""Copies beside the work: the order of what a device's module is asked for, and the memory they come from."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mochi_core.memory import copies
from mochi_core.memory.copies import SideStream, pinned, pinned_pieces


@pytest.fixture
def module(monkeypatch):
    """A device's module that writes down what is asked of its streams."""
    calls = []

    class Stream:
        def __init__(self, device=None, name="side"):
            self.name = name
            calls.append(("made for", str(device))) if name == "side" else None

        def record_event(self):
            calls.append((self.name, "records"))
            return SimpleNamespace(synchronize=lambda: calls.append(("host", "waits")))

        def wait_event(self, event):
            calls.append((self.name, "waits for event"))

        def wait_stream(self, stream):
            calls.append((self.name, f"waits for {stream.name}"))

    @contextmanager
    def stream(which):
        calls.append(("enter", which.name))
        yield
        calls.append(("leave", which.name))

    fake = SimpleNamespace(
        Stream=Stream, stream=stream, current_stream=lambda device: Stream(name="compute"), calls=calls
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    return fake


class TestSideStream:
    def test_without_streams_a_copy_is_done_at_once(self):
        side, target = SideStream("cpu"), torch.zeros(3)
        side.copy(torch.ones(3), target)
        assert torch.equal(target, torch.ones(3)) and not side.overlaps
        ticket = side.mark()
        side.wait(ticket)
        side.follow()
        side.finish(ticket)

    def test_no_autograd(self):
        target = torch.zeros(3)
        SideStream("cpu").copy(torch.ones(3, requires_grad=True), target)
        assert not target.requires_grad

    def test_each_call_reaches_its_stream(self, module):
        side, target = SideStream("cuda:0"), torch.zeros(3)
        assert side.overlaps
        side.follow()
        side.copy(torch.ones(3), target)
        ticket = side.mark()
        side.wait(ticket)
        side.finish(ticket)
        assert module.calls == [
            ("made for", "cuda:0"),
            ("side", "waits for compute"),
            ("enter", "side"),
            ("leave", "side"),
            ("side", "records"),
            ("compute", "waits for event"),
            ("host", "waits"),
        ]
        assert torch.equal(target, torch.ones(3))

    def test_made_synchronous(self, module):
        side, target = SideStream("cuda", synchronous=True), torch.zeros(3)
        side.follow()
        side.copy(torch.ones(3), target)
        side.wait(side.mark())
        assert not side.overlaps and module.calls == [] and torch.equal(target, torch.ones(3))

    def test_fake_tensors(self):
        with torch._subclasses.FakeTensorMode():
            side, target = SideStream("cuda", synchronous=True), torch.empty(3, device="cuda")
            side.copy(pinned(3, "cuda"), target)
            side.wait(side.mark())


class TestPinned:
    def test_by_size_or_by_example(self):
        assert pinned(5, "cpu").shape == (5,) and pinned(5, "cpu").dtype == torch.uint8
        like = pinned(torch.zeros(2, 3, dtype=torch.bfloat16), "cpu")
        assert like.shape == (2, 3) and like.dtype == torch.bfloat16

    def test_normal_tensors_in_inference_mode(self):
        with torch.inference_mode():
            assert not pinned(5, "cpu").is_inference()

    @pytest.fixture
    def lockable(self, monkeypatch):
        """A machine that can pin, up to as many bytes as `lockable` gets."""
        limit = SimpleNamespace(bytes=0)
        empty = torch.empty

        def allocate(*shape, pin_memory=False, **options):
            tensor = empty(*shape, **options)
            if pin_memory and tensor.nbytes > limit.bytes:
                raise RuntimeError("CUDA error: out of memory\nand much advice")
            tensor.pinned_here = pin_memory
            return tensor

        monkeypatch.setattr(copies, "_can_pin", lambda device: True)
        monkeypatch.setattr(torch, "empty", allocate)
        monkeypatch.setattr(copies, "_warned", [])
        return limit

    def test_ordinary_memory_when_the_system_refuses_and_one_warning(self, lockable, caplog):
        lockable.bytes = 10
        with caplog.at_level(logging.WARNING):
            assert [pinned(size, "cuda").pinned_here for size in (11, 10, 12)] == [False, True, False]
        (record,) = caplog.records
        assert "(CUDA error: out of memory)" in record.getMessage()

    def test_no_warning_where_nothing_is_pinned(self, caplog):
        pinned(10, "cpu")
        assert not caplog.records

    @pytest.mark.parametrize("size", (0, 1, 16, 17, 410, 1000, 1024, 12345))
    def test_pieces_waste_little(self, size, monkeypatch):
        monkeypatch.setattr(copies, "SMALLEST_PIECE", 16)
        lengths = [len(piece) for piece in pinned_pieces(size, "cpu")]
        taken = sum(1 << (length - 1).bit_length() for length in lengths)
        assert sum(lengths) == size and size <= taken < size + 16
