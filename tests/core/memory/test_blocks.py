"""Streaming blocks: the same numbers, no more on the device than said, and a network that is itself again."""

import shutil
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mochi_core.errors import MochiError, WeightsError
from mochi_core.memory.blocks import block_bytes, device_bytes, spread, streamed
from mochi_core.memory.borrowing import on_device
from mochi_core.memory.copies import SideStream
from mochi_core.weights import build
from mochi_core.weights.convert import convert
from mochi_core.weights.files import Unchanged
from mochi_core.weights.lora import Branch, attached
from mochi_core.weights.lora_file import LowRank

BLOCKS = 4


class Late(SideStream):
    """A device whose copies happen only when somebody waits for them, at the last moment, and that writes a log."""

    def __init__(self):
        super().__init__("cpu")
        self.log, self._queue, self._lock = [], [], threading.RLock()

    overlaps = True

    def copy(self, source, target):
        with self._lock:
            self._queue.append((source, target))
            self.log.append("copy")

    def mark(self):
        with self._lock:
            self._queue.append(ticket := object())
            return ticket

    def wait(self, ticket):
        self.log.append("wait")
        self.finish(ticket)

    def follow(self):
        self.log.append("follow")

    def finish(self, ticket):
        with self._lock:
            self.log.append("finish") if threading.current_thread() is not threading.main_thread() else None
            while ticket in self._queue:
                first = self._queue.pop(0)
                if isinstance(first, tuple):
                    super().copy(*first)


class Interruption(BaseException):
    """Like that from the keyboard: no `Exception`."""


STREAMS = pytest.mark.parametrize("stream", (lambda: SideStream("cpu"), Late), ids=("at once", "late"))
SOURCES = pytest.mark.parametrize("source", ("pinned", "file"))


@pytest.fixture
def dit():
    return build.load_dit(build.TINY_DIT, dtype=torch.float32)[0]


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "dit.safetensors"
    convert(build.TINY_DIT, path, format="q8_0")
    return path


@pytest.fixture(params=("dit", "packed dit", "t5"))
def case(request, dit, dit_inputs, packed_file):
    """A network, its blocks, and how to run it."""
    if request.param == "t5":
        network = build.load_t5(build.TINY_T5, dtype=torch.float32)
        ids = torch.tensor([[5, 9, 3, 1, 0], [7, 1, 0, 0, 0]])
        return network, network.encoder.block, lambda: network(ids, attention_mask=(ids > 0).long()).last_hidden_state
    network = dit if request.param == "dit" else build.load_dit(packed_file, dtype=torch.float32)[0]
    return network, network.blocks, lambda: network(*dit_inputs)


@pytest.fixture
def dit_inputs(dit):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, dit.config.latent_channels, 2, 4, 6, generator=generator)
    text = torch.randn(1, 5, dit.config.text_feature_dim, generator=generator)
    return latents, torch.tensor([0.4]), text, torch.ones(1, 5, dtype=torch.int64)


@pytest.fixture
def untouched():
    """`untouched(network)`: a function that says whether it has the tensors it had, and neither hook nor thread."""

    def remember(network):
        def tensors():
            named = (network.named_parameters, network.named_buffers)
            return [(name, tensor) for find in named for name, tensor in find(remove_duplicate=False)]

        before = tensors()

        def check():
            now = tensors()
            same = [name for name, _ in now] == [name for name, _ in before]
            same = same and all(a is b for (_, a), (_, b) in zip(now, before))
            hooks = [m for m in network.modules() if m._forward_hooks or m._forward_pre_hooks]
            return same and not hooks and not any(t.name.startswith("mochi-blocks") for t in threading.enumerate())

        return check

    return remember


def on_pass(layer, action):
    """`action()` whenever the layer is about to compute."""
    return layer.register_forward_pre_hook(lambda *_: action())


class TestNumbers:
    @STREAMS
    @SOURCES
    @pytest.mark.parametrize("resident", (0, 1, 100))
    def test_bit_equal_to_all_on_the_device(self, case, source, resident, stream, untouched):
        network, blocks, run = case
        is_untouched = untouched(network)
        with torch.inference_mode():
            expected = run()
            with streamed(network, blocks, "cpu", resident=resident, source=source, copies=stream()) as traffic:
                assert all(torch.equal(run(), expected) for _ in range(3))
                assert bool(traffic.order) == (resident < len(blocks))
        assert is_untouched()

    @STREAMS
    @SOURCES
    def test_blocks_in_any_order(self, dit, source, stream):
        inputs = [torch.randn(1, 3, n) for n in (dit.config.visual_dim, dit.config.text_dim)]
        rotation = torch.ones(3, dit.config.heads, dit.config.head_dim // 2, dtype=torch.complex64)
        rest = torch.randn(1, dit.config.visual_dim), rotation, None
        with torch.no_grad():
            expected = [block(*inputs, *rest)[0] for block in dit.blocks]
            with streamed(dit, dit.blocks, "cpu", resident=0, source=source, copies=stream()):
                for index in (2, 2, 0, 3, 1, 1, 0, 3, 3, 2, 1, 0, 0, 1, 3, 0):
                    assert torch.equal(dit.blocks[index](*inputs, *rest)[0], expected[index]), index

    @pytest.mark.parametrize("lora_first", (True, False))
    @STREAMS
    def test_loras(self, dit, dit_inputs, lora_first, stream, untouched):
        layers = {}
        for name in ("blocks.0.attn.qkv_x", "blocks.2.mlp_x.w1", "t5_yproj"):
            layer = dit.get_submodule(name)
            magnitude = torch.rand(layer.out_features) if name.startswith("blocks.2") else None
            low_rank = LowRank(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2), 0.1, magnitude)
            layers[name] = Branch(((low_rank, 0.7),))
        is_untouched = untouched(dit)
        with torch.inference_mode():
            plain = dit(*dit_inputs)
            with attached(dit, layers):
                expected = dit(*dit_inputs)
            assert not torch.equal(plain, expected)
            with ExitStack() as stack:
                if lora_first:
                    stack.enter_context(attached(dit, layers))
                stack.enter_context(streamed(dit, dit.blocks, "cpu", resident=1, copies=stream()))
                if not lora_first:
                    stack.enter_context(attached(dit, layers))
                assert all(torch.equal(dit(*dit_inputs), expected) for _ in range(2))
        assert is_untouched()

    def test_tensors_that_do_not_lie_in_a_row(self):
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
        network[0].weight = nn.Parameter(torch.randn(3, 3).T, requires_grad=False)
        network[1].register_buffer("none", torch.empty(0))
        network[1].register_buffer("one", torch.tensor(2, dtype=torch.int8))
        network[1].register_forward_hook(lambda layer, inputs, output: output * layer.one + layer.none.sum())
        x = torch.randn(2, 3)
        expected = network(x)
        with streamed(network, list(network), "cpu", resident=0, copies=Late()):
            torch.testing.assert_close(network(x), expected)

    def test_fake_tensors(self, dit):
        with torch._subclasses.FakeTensorMode(), torch.inference_mode():
            network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).requires_grad_(False)
            copies = SideStream("cuda", synchronous=True)
            with streamed(network, list(network), "cuda", resident=1, copies=copies) as traffic:
                assert network(torch.empty(2, 8, device="cuda")).device.type == "cuda"
            assert list(traffic.order) == [0, 2, 3, 0] and network[1].weight.device.type == "cpu"


class TestGradients:
    @pytest.fixture
    def gradients(self, dit, dit_inputs):
        """`gradients(run_block)`: those of an input and of low-rank matrices beside a layer in each block."""

        def compute(run_block):
            latents = dit_inputs[0].clone().requires_grad_()
            generator, learned, handles = torch.Generator().manual_seed(1), [], []
            for block in dit.blocks:
                layer = block.attn.qkv_x
                down = torch.randn(2, layer.in_features, generator=generator).requires_grad_()
                up = torch.randn(layer.out_features, 2, generator=generator).requires_grad_()
                add = lambda _, inputs, output, down=down, up=up: output + inputs[0] @ down.T @ up.T * 0.01  # noqa: E731
                handles.append(layer.register_forward_hook(add))
                learned += [down, up]
            try:
                dit(latents, *dit_inputs[1:], run_block=run_block).square().mean().backward()
            finally:
                for handle in handles:
                    handle.remove()
            return [tensor.grad for tensor in (latents, *learned)]

        return compute

    @STREAMS
    @SOURCES
    @pytest.mark.parametrize("reentrant", (True, False))
    @pytest.mark.parametrize("resident", (0, 1))
    def test_checkpointed_blocks(self, dit, gradients, source, stream, reentrant, resident, untouched):
        is_untouched = untouched(dit)
        expected = gradients(lambda index, block, *inputs: block(*inputs))
        assert all(gradient.any() for gradient in expected)
        run_block = lambda index, block, *inputs: checkpoint(block, *inputs, use_reentrant=reentrant)  # noqa: E731
        with streamed(dit, dit.blocks, "cpu", resident=resident, source=source, copies=stream()) as traffic:
            for _ in range(2):
                assert all(torch.equal(got, want) for got, want in zip(gradients(run_block), expected))
        assert is_untouched()
        if resident == 0:
            # There, the first block in vain as the next forward might have come, back, and there again.
            assert list(traffic.order) == [0, 1, 2, 3, 0, 2, 1, 0, 2, 3, 0, 2, 1, 0]

    def test_without_checkpoints_there_is_an_error_instead_of_wrong_gradients(self, dit, gradients, untouched):
        is_untouched = untouched(dit)
        with (
            pytest.raises(MochiError, match="checkpointed by itself"),
            streamed(dit, dit.blocks, "cpu", resident=0, copies=SideStream("cpu")),
        ):
            gradients(lambda index, block, *inputs: block(*inputs))
        assert is_untouched()

    def test_two_blocks_in_one_checkpoint(self, dit, gradients):
        def run_block(index, block, *inputs):
            def both(visual, text, *rest):
                return dit.blocks[index + 1](*block(visual, text, *rest), *rest)

            return inputs[:2] if index % 2 else checkpoint(both, *inputs, use_reentrant=False)

        with (
            pytest.raises(MochiError, match="checkpointed by itself"),
            streamed(dit, dit.blocks, "cpu", resident=0, copies=SideStream("cpu")),
        ):
            gradients(run_block)

    def test_trainable_weights_in_a_block_stay_where_they_are(self, dit, dit_inputs):
        bias = dit.blocks[1].mod_x.bias.requires_grad_()
        with streamed(dit, dit.blocks, "cpu", resident=0, copies=Late()):
            run_block = lambda index, block, *inputs: checkpoint(block, *inputs, use_reentrant=False)  # noqa: E731
            dit(*dit_inputs, run_block=run_block).square().mean().backward()
            assert dit.blocks[1].mod_x.bias is bias
        assert bias.grad.any()

    def test_trainable_weights_elsewhere_are_refused(self, dit, untouched):
        is_untouched = untouched(dit)
        dit.blocks[1].mod_x.bias.requires_grad_()
        with pytest.raises(MochiError, match="trainable"), streamed(dit, dit.blocks, "meta", resident=0):
            pass
        assert is_untouched()


class TestTurns:
    @SOURCES
    @pytest.mark.parametrize("resident, order", ((0, [0, 1, 2, 3] * 3 + [0]), (1, [0, 2, 3] * 3 + [0]), (2, [1, 3])))
    def test_each_block_comes_once_a_step_and_no_more_are_there_than_planned(
        self, dit, dit_inputs, source, resident, order
    ):
        with (
            torch.inference_mode(),
            streamed(dit, dit.blocks, "cpu", resident=resident, source=source, copies=Late()) as traffic,
        ):
            seen = []
            handles = [on_pass(block.mlp_x, lambda: seen.append(traffic.on_device)) for block in dit.blocks]
            for _ in range(3):
                dit(*dit_inputs)
            for handle in handles:
                handle.remove()
            assert len(seen) == 3 * BLOCKS and max(seen) == resident + 2 == traffic.most
        sizes = block_bytes(dit.blocks)
        assert list(traffic.order) == order
        assert traffic.bytes_copied == sum(sizes[index] for index in order)
        assert traffic.on_device == resident  # the slots are gone

    def test_the_next_copy_starts_before_a_block_computes(self, dit, dit_inputs):
        copies = Late()
        handles = [
            on_pass(block.mod_x, lambda index=index: copies.log.append(index)) for index, block in enumerate(dit.blocks)
        ]
        with torch.inference_mode(), streamed(dit, dit.blocks, "cpu", resident=0, copies=copies):
            dit(*dit_inputs)
            log = [entry for i, entry in enumerate(copies.log) if entry != "copy" or copies.log[i - 1] != "copy"]
        for handle in handles:
            handle.remove()
        fetch = ["follow", "copy"]
        # Both slots at once, then one whenever a block has done with its slot, and the first again at the end.
        assert log == [*fetch * 2, "wait", 0, *fetch, "wait", 1, *fetch, "wait", 2, *fetch, "wait", 3]

    def test_a_file_is_read_into_memory_that_has_been_copied(self, dit, dit_inputs):
        copies = Late()
        with torch.inference_mode(), streamed(dit, dit.blocks, "cpu", resident=0, source="file", copies=copies):
            for _ in range(2):
                dit(*dit_inputs)
        log = [entry for entry in copies.log if entry in ("finish", "copy")]
        # The last is for a turn that never comes: whether it was begun is a matter of time.
        every = ["copy", "copy"] + ["finish", "copy"] * 7
        assert log in (every, every[:-2])

    @SOURCES
    def test_nothing_is_on_its_way_afterwards(self, dit, dit_inputs, source):
        copies = Late()
        with torch.inference_mode(), streamed(dit, dit.blocks, "cpu", resident=0, source=source, copies=copies):
            dit(*dit_inputs)
        assert not copies._queue

    def test_backwards_too_the_next_copy_starts_before_a_block_computes(self):
        network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))).requires_grad_(False)
        x, orders = torch.ones(3), []
        with streamed(network, list(network), "cpu", resident=0, copies=Late()) as traffic:
            for index in (0, 1, 2, 3, 3, 2, 1, 0, 0, 1):
                handle = on_pass(network[index], lambda: orders.append("".join(map(str, traffic.order))))
                network[index](x)
                handle.remove()
        forward = ["01", "012", "0123", "01230"]
        assert orders == [*forward, "012302", "0123021", "01230210", "01230210", "01230210", "012302102"]

    def test_a_resident_block_lets_the_copy_start_after_the_one_before_it(self, dit, dit_inputs):
        assert spread(BLOCKS, 1) == [0, 2, 3]
        counts = []
        with torch.inference_mode(), streamed(dit, dit.blocks, "cpu", resident=1, copies=Late()) as traffic:
            handles = [on_pass(block.mod_x, lambda: counts.append(len(traffic.order))) for block in dit.blocks]
            dit(*dit_inputs)
            for handle in handles:
                handle.remove()
        assert counts == [2, 3, 3, 4]

    def test_a_block_has_its_own_weights_before_and_after_its_turn(self, dit, dit_inputs):
        own = [block.mod_x.weight for block in dit.blocks]
        seen = []
        handle = on_pass(
            dit.blocks[1].mod_x, lambda: seen.append([b.mod_x.weight is w for b, w in zip(dit.blocks, own)])
        )
        with torch.inference_mode(), streamed(dit, dit.blocks, "cpu", resident=0, copies=Late()):
            dit(*dit_inputs)
        handle.remove()
        assert seen == [[True, False, True, True]]

    def test_weights_on_their_turn_are_like_the_network_s_own_and_there_for_other_hooks(self, dit, dit_inputs):
        block, seen = dit.blocks[1], []
        own = block.mod_x.weight

        def look(*_):
            weight = block.mod_x.weight
            seen.append((weight is own, type(weight), weight.is_inference(), weight.dtype, weight.shape))

        handles = [block.register_forward_pre_hook(look), block.register_forward_hook(look)]
        with torch.inference_mode(), streamed(dit, dit.blocks, "cpu", resident=0, copies=Late()):
            dit(*dit_inputs)
        for handle in handles:
            handle.remove()
        assert seen == [(False, nn.Parameter, False, own.dtype, own.shape)] * 2

    @pytest.mark.parametrize("count", (1, 2, 7, 48))
    def test_streamed_blocks_lie_evenly(self, count):
        assert spread(count, 0) == list(range(count)) and spread(count, count + 1) == []
        for resident in range(count):
            found = spread(count, resident)
            gaps = [b - a for a, b in zip(found, [*found[1:], found[0] + count])]
            assert len(found) == count - resident and min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


class TestErrors:
    @pytest.mark.parametrize("error", (RuntimeError, Interruption))
    @pytest.mark.parametrize("resident", (0, 1))
    @SOURCES
    def test_in_the_middle_of_a_block(self, dit, dit_inputs, error, resident, source, untouched):
        is_untouched = untouched(dit)

        def fail():
            raise error("stop")

        own = list(dit.blocks.parameters())
        with torch.inference_mode():
            expected = dit(*dit_inputs)
            with (
                pytest.raises(error, match="stop"),
                streamed(dit, dit.blocks, "cpu", resident=resident, source=source, copies=Late()),
            ):
                for index in range(BLOCKS):
                    handle = on_pass(dit.blocks[index].mlp_x, fail)
                    with pytest.raises(error, match="stop"):
                        dit(*dit_inputs)
                    handle.remove()
                    # torch has no hook for an interruption: then the next block that runs puts them back.
                    assert error is Interruption or all(a is b for a, b in zip(own, dit.blocks.parameters()))
                    assert torch.equal(dit(*dit_inputs), expected)
                handle = on_pass(dit.blocks[2].mlp_x, fail)
                dit(*dit_inputs)
            handle.remove()
            assert is_untouched()
            with streamed(dit, dit.blocks, "cpu", resident=resident, source=source, copies=Late()):
                assert torch.equal(dit(*dit_inputs), expected)

    def test_an_interrupted_block_gives_its_weights_back_when_another_runs(self, dit, dit_inputs):
        own, seen = list(dit.blocks[2].parameters()), []

        def fail():
            raise Interruption

        def look():
            seen.append(all(a is b for a, b in zip(own, dit.blocks[2].parameters())))

        with torch.inference_mode(), streamed(dit, dit.blocks, "cpu", resident=0, copies=Late()):
            handle = on_pass(dit.blocks[2].mlp_x, fail)
            with pytest.raises(Interruption):
                dit(*dit_inputs)
            handle.remove()
            handle = on_pass(dit.blocks[0].mlp_x, look)
            dit(*dit_inputs)
            handle.remove()
        assert seen == [True]

    def test_while_weights_are_moved(self, dit, untouched):
        is_untouched, calls = untouched(dit), []

        def check():
            calls.append(None)
            if len(calls) == 7:
                raise Interruption

        with pytest.raises(Interruption), streamed(dit, dit.blocks, "meta", resident=3, check=check):
            pass
        assert is_untouched()

    def test_a_file_that_becomes_shorter(self, tmp_path, dit_inputs, untouched):
        path = tmp_path / "dit.safetensors"
        shutil.copy(build.TINY_DIT, path)
        network = build.load_dit(path)[0]
        inputs = [x.to(torch.bfloat16) if x.ndim > 2 else x for x in dit_inputs]
        is_untouched = untouched(network)
        with (
            torch.inference_mode(),
            streamed(network, network.blocks, "cpu", resident=0, source="file", check=Unchanged(path), copies=Late()),
        ):
            network(*inputs)
            with path.open("r+b") as file:  # by a byte: the rest of the network lies in this file too
                file.truncate(path.stat().st_size - 1)
            with pytest.raises(WeightsError, match=r"dit\.safetensors has changed .* bytes instead of"):
                network(*inputs)
        assert is_untouched()

    def test_the_same_network_twice(self, dit, dit_inputs, untouched):
        is_untouched = untouched(dit)
        with streamed(dit, dit.blocks, "cpu", resident=0, copies=Late()):
            with pytest.raises(MochiError, match="already"), streamed(dit, dit.blocks, "cpu", resident=0):
                pass
            with pytest.raises(MochiError, match="already"), on_device(dit, "cpu"):
                pass
            with torch.inference_mode():
                dit(*dit_inputs)
        assert is_untouched()
        with on_device(dit, "meta"):
            pass

    def test_fewer_than_no_residents(self, dit):
        with pytest.raises(MochiError, match="-1 blocks"), streamed(dit, dit.blocks, "cpu", resident=-1):
            pass


class TestPlaces:
    @pytest.mark.parametrize("resident, copies", ((4, SideStream("cpu")), (0, None)))
    def test_no_hooks_when_nothing_must_move(self, dit, dit_inputs, resident, copies, untouched):
        is_untouched = untouched(dit)
        with torch.inference_mode(), streamed(dit, dit.blocks, "cpu", resident=resident, copies=copies) as traffic:
            assert is_untouched() and traffic.on_device == traffic.most == BLOCKS
            dit(*dit_inputs)
        assert not traffic.order

    def test_what_is_not_streamed_is_on_the_device(self, dit, untouched):
        is_untouched = untouched(dit)
        with streamed(dit, dit.blocks, "meta", resident=1, copies=SideStream("cpu")):
            places = {name: parameter.device.type for name, parameter in dit.named_parameters()}
        expected = dict.fromkeys(places, "meta") | {
            name: "cpu" for name in places if name.startswith(("blocks.0.", "blocks.2.", "blocks.3."))
        }
        assert places == expected and is_untouched()

    def test_a_whole_network_there_and_back(self, packed_file, untouched):
        network = build.load_dit(packed_file)[0]
        is_untouched = untouched(network)
        with torch.inference_mode(), on_device(network, "meta"):
            tensors = [*network.parameters(), *network.buffers()]
            assert {tensor.device.type for tensor in tensors} == {"meta"}
            assert not any(tensor.is_inference() for tensor in tensors)
        assert is_untouched()

    def test_tied_weights_stay_tied(self, untouched):
        network = build.load_t5(build.TINY_T5)
        is_untouched = untouched(network)
        with on_device(network, "meta"):
            assert network.shared.weight is network.encoder.embed_tokens.weight
        assert is_untouched()

    def test_weights_tied_within_a_block_come_once(self):
        block = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).requires_grad_(False)
        block[1].weight = block[0].weight
        network, x = nn.Sequential(block), torch.randn(2, 64)
        expected = network(x)
        seen = []
        handle = on_pass(block[1], lambda: seen.append(block[0].weight is block[1].weight))
        with streamed(network, [block], "cpu", resident=0, copies=Late()) as traffic:
            assert torch.equal(network(x), expected)
        handle.remove()
        assert traffic.bytes_copied == 64 * 64 * 4 and seen == [True]


class TestSizes:
    def test_by_hand(self):
        # 8 x 16 floats are a unit of the allocator, a bias of 8 or 16 takes one by itself.
        small, large, other = nn.Linear(16, 8), nn.Linear(16, 16), nn.Linear(16, 8, bias=False)
        network = nn.Sequential(small, large, small.requires_grad_(False), other).requires_grad_(False)
        blocks = [small, large]
        assert block_bytes(blocks) == [1024, 1536]
        assert device_bytes(network, blocks, 2) == 1024 + 1536 + 512
        assert device_bytes(network, blocks, 1) == 1024 + 1536 + 512  # the second is streamed, in its one slot
        assert device_bytes(network, blocks, 0) == 2 * 1536 + 512

    def test_of_a_t5_whose_embedding_has_two_names(self):
        network = build.load_t5(build.TINY_T5)
        blocks = network.encoder.block
        rest = network.shared.weight.nbytes + 512  # and the last norm
        assert device_bytes(network, blocks, len(blocks)) == sum(block_bytes(blocks)) + rest
