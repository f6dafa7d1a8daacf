import pytest
import torch

from benchmarks import harness
from benchmarks.live_bytes import LiveBytes
from mochi_core.config import MOCHI_1, TINY, StagesConfig, VAEConfig
from mochi_core.errors import LatentsError
from mochi_core.vae import Decoder
from mochi_core.vae.causal_conv import KeptContext
from mochi_core.vae.decoder import to_frames

pytestmark = pytest.mark.usefixtures("no_gradients")
# of a raw output from -1 to 1: 2e-6 of its range in float32
STREAM_ERROR = {torch.float32: 4e-6, torch.float64: 1e-12}


@pytest.fixture
def decoder(tiny):
    return tiny.decoder


def latents(frames, batch=1, height=4, width=6):
    return torch.randn(batch, 12, frames, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def medium():
    """Like the released decoder but narrow: several blocks in each stage."""
    stages = StagesConfig(32, (1, 2, 3, 4), (1, 2, 2, 1, 2), (False,) * 5)
    decoder = Decoder(VAEConfig(decoder=stages), device="meta").to_empty(device="cpu")
    harness.randomize(decoder, seed=3)
    return decoder


def streamed(decoder, z, latents_at_once=1, **context):
    return torch.cat(list(decoder.stream(z, latents_at_once, KeptContext(**context))), dim=2)


class TestStreaming:
    @pytest.mark.parametrize("latents_at_once", (1, 2, 3, 4))
    def test_it_is_exact(self, goldens, golden_decoder, dtype, latents_at_once):
        decoder, z = golden_decoder(dtype), goldens.tensors("vae_decoder_cases")["in/z"][..., :4, :3].to(dtype)
        pieces = list(decoder.stream(z, latents_at_once))
        assert len(pieces) == -(-4 // latents_at_once)
        torch.testing.assert_close(torch.cat(pieces, dim=2), decoder(z), rtol=0, atol=STREAM_ERROR[dtype])

    @pytest.mark.parametrize("latents_at_once", (1, 2, 3, 99))
    def test_it_is_exact_with_the_tiny_decoder(self, decoder, latents_at_once):
        z = latents(5, batch=2)
        whole = decoder(z)
        torch.testing.assert_close(streamed(decoder, z, latents_at_once), whole, rtol=0, atol=STREAM_ERROR[z.dtype])

    @pytest.mark.parametrize("latents_at_once", (1, 2, 3, 99))
    def test_it_is_exact_with_a_medium_decoder(self, medium, latents_at_once):
        z = latents(4)
        whole = medium(z)
        error = 2e-6 * (whole.max() - whole.min()).item()
        torch.testing.assert_close(streamed(medium, z, latents_at_once), whole, rtol=0, atol=error)

    @pytest.mark.parametrize("values", (1, 3_000, 20_000, 70_000))
    def test_parts_and_bands_are_exact(self, medium, values):
        """From a row at a time to several frames."""
        z = latents(3, batch=2)
        whole = medium(z)
        error = 2e-6 * (whole.max() - whole.min()).item()
        torch.testing.assert_close(streamed(medium, z, values_at_once=values), whole, rtol=0, atol=error)

    @pytest.mark.parametrize("values, most_frames", [(60_000, 1), (100_000, 2), (10**9, 6)])
    def test_wide_stages_take_a_piece_in_parts(self, decoder, values, most_frames):
        pieces = list(decoder.stream(latents(3), context=KeptContext(values_at_once=values)))
        assert max(piece.shape[2] for piece in pieces) == most_frames
        assert sum(piece.shape[2] for piece in pieces) == 13

    @pytest.mark.parametrize("count", range(1, 29))
    def test_no_frame_is_lost(self, decoder, count):
        """1 to 163 frames."""
        z = latents(count, height=2, width=2)
        frames = streamed(decoder, z)
        assert frames.shape == (1, 3, 6 * (count - 1) + 1, 16, 16)
        # Norms over so few pixels amplify what kernels round.
        torch.testing.assert_close(frames, decoder(z), rtol=0, atol=2e-5)

    def test_two_hundred_latent_frames(self, decoder):
        assert streamed(decoder, latents(200, height=1, width=1)).shape[2] == 1195

    def test_what_is_alive_does_not_grow_with_the_clip(self, decoder):
        def most_alive(count):
            with LiveBytes() as live:
                for _ in decoder.stream(latents(count)):
                    pass
            return live.peak

        assert most_alive(12) - most_alive(3) <= 9 * latents(1).nbytes

    def test_pieces_come_as_they_are_ready(self, decoder, layer_runs):
        runs = layer_runs(decoder)
        stream = decoder.stream(latents(3))
        assert not runs
        assert next(stream).shape[2] == 1
        after_one = runs.total()
        assert next(stream).shape[2] == 6
        assert runs.total() == 2 * after_one

    def test_two_streams_do_not_disturb_each_other(self, decoder):
        first, second = latents(2), latents(2) + 1
        together = zip(decoder.stream(first), decoder.stream(second))
        for index, pieces in enumerate(zip(*together)):
            alone = list(decoder.stream((first, second)[index]))
            assert all(torch.equal(a, b) for a, b in zip(pieces, alone))

    @pytest.mark.parametrize("latents_at_once", (0, -1))
    def test_pieces_of_nothing(self, decoder, latents_at_once):
        with pytest.raises(ValueError):
            list(decoder.stream(latents(2), latents_at_once))


@pytest.mark.parametrize("frames", (1, 2, 3, 4, 5))
@pytest.mark.parametrize("batch", (1, 2))
def test_frame_counts(decoder, frames, batch):
    assert decoder(latents(frames, batch)).shape == (batch, 3, 6 * (frames - 1) + 1, 32, 48)


def test_a_batch_is_each_alone(decoder):
    z = latents(3, batch=2)
    alone = torch.cat([decoder(z[:1]), decoder(z[1:])])
    torch.testing.assert_close(decoder(z), alone, rtol=0, atol=5e-6)


def test_the_first_latents_give_the_first_frames(decoder):
    z = latents(4)
    torch.testing.assert_close(decoder(z[:, :, :2]), decoder(z)[:, :, :7], rtol=0, atol=5e-6)


def test_latents_are_left_alone(decoder):
    z = latents(2).contiguous(memory_format=torch.channels_last_3d)
    decoder(z)
    list(decoder.stream(z))
    assert torch.equal(z, latents(2))


def test_with_gradients(decoder):
    z = latents(2)
    expected = decoder(z)
    with torch.enable_grad():
        z.requires_grad_()
        out = decoder(z)
        out.square().sum().backward()
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=5e-6)
    assert z.grad.isfinite().all() and z.grad.any()


def test_bfloat16_is_near(decoder):
    half = Decoder(TINY.vae, dtype=torch.bfloat16)
    half.load_state_dict(decoder.state_dict())
    z, expected = latents(3), decoder(latents(3))
    assert (half(z.bfloat16()).float() - expected).std() / expected.std() < 0.03


@pytest.mark.parametrize(
    "shape", [(12, 1, 2, 2), (1, 16, 1, 2, 2), (1, 12, 0, 2, 2), (0, 12, 1, 2, 2), (1, 12, 1, 0, 2)]
)
def test_latents_that_do_not_fit(decoder, layer_runs, shape):
    runs = layer_runs(decoder)
    with pytest.raises(
        LatentsError, match=r"^The latents have shape .*: they must be B x 12 x T x H x W\. Use latents of"
    ):
        decoder(torch.zeros(shape))
    assert not runs


def test_frames_are_pictures():
    raw = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).view(1, 3, 1, 1, 2)
    frames = to_frames(raw.bfloat16())
    assert frames.shape == (1, 1, 1, 2, 3) and frames.dtype == torch.float32
    assert frames[0, 0, 0].tolist() == [[0.0, 0.5, 1.0], [0.0, 0.75, 1.0]]


def test_making_pictures_leaves_the_raw_output_alone():
    raw = torch.ones(1, 3, 1, 2, 2) * 0.5
    to_frames(raw)
    assert (raw == 0.5).all()


def test_every_layer_with_weights_comes_from_the_operations(marked_operations, layers_with_weights):
    layers = layers_with_weights(Decoder(TINY.vae, operations=marked_operations, device="meta"))
    assert len(layers) > 20
    assert all(hasattr(layer, "is_marked") for layer in layers.values())


def test_names_and_shapes_of_the_released_model(goldens):
    decoder = Decoder(MOCHI_1.vae, device="meta")
    shapes = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert shapes == goldens.json("manifests")["genmo_decoder"]
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 362_526_595
