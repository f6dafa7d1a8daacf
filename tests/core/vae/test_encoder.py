import math

import pytest
import torch
from torch import nn

from benchmarks import harness
from mochi_core.config import MOCHI_1, TINY, StagesConfig, VAEConfig
from mochi_core.errors import ShapeError
from mochi_core.vae import Encoder, Posterior
from mochi_core.vae.encoder import fourier_features
from mochi_core.weights import build

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def encoder():
    return build.load_vae(build.TINY_VAE, dtype=torch.float32).encoder


def video(frames, batch=1, height=16, width=24):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("frames", (1, 7, 13, 19))
@pytest.mark.parametrize("batch", (1, 2))
def test_latent_counts(encoder, frames, batch):
    posterior = encoder(video(frames, batch))
    assert posterior.mean.shape == posterior.logvar.shape == (batch, 12, (frames - 1) // 6 + 1, 2, 3)


@pytest.mark.parametrize("frames", (1, 7, 13))
def test_the_first_frames_give_the_first_latents(golden_encoder, dtype, frames):
    encoder, clip = golden_encoder(dtype), video(19).to(dtype)
    first, whole = encoder(clip[:, :, :frames]), encoder(clip)
    count = (frames - 1) // 6 + 1
    for name in ("mean", "logvar"):
        torch.testing.assert_close(getattr(first, name), getattr(whole, name)[:, :, :count], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def attentive():
    """Attention in every stage, the first included."""
    stages = StagesConfig(32, (1, 2, 1, 2), (1, 1, 2, 1, 1), (True,) * 5)
    encoder = Encoder(VAEConfig(encoder=stages), device="meta").to_empty(device="cpu")
    harness.randomize(encoder, seed=5)
    return encoder


class TestStagewise:
    """In any split the same as whole."""

    @pytest.mark.parametrize("values", (1, 5_000, 60_000, 10**9))
    @pytest.mark.parametrize("frames", (1, 7, 25))
    def test_it_is_whole(self, encoder, attentive, values, frames):
        for network in (encoder, attentive):
            whole, stagewise = network(video(frames)), network.stagewise(video(frames), values_at_once=values)
            for name in ("mean", "logvar"):
                expected = getattr(whole, name)
                error = 1e-5 * max(1, expected.abs().max().item())
                torch.testing.assert_close(getattr(stagewise, name), expected, rtol=0, atol=error)

    def test_the_goldens(self, golden_encoder, dtype):
        encoder, clip = golden_encoder(dtype), video(13, batch=2).to(dtype)
        error = 5e-6 if dtype == torch.float32 else 1e-12
        whole, stagewise = encoder(clip), encoder.stagewise(clip, values_at_once=20_000)
        torch.testing.assert_close(stagewise.mean, whole.mean, rtol=0, atol=error)
        torch.testing.assert_close(stagewise.logvar, whole.logvar, rtol=0, atol=error)

    def test_bfloat16(self, encoder):
        half = Encoder(TINY.vae, dtype=torch.bfloat16)
        half.load_state_dict(encoder.state_dict())
        whole, stagewise = (run(video(7), torch.bfloat16).mean.float() for run in (half, half.stagewise))
        assert (stagewise - whole).std() / whole.std() < 0.02

    def test_the_video_is_left_alone(self, encoder):
        clip = video(7)
        encoder.stagewise(clip, values_at_once=1000)
        assert torch.equal(clip, video(7))

    def test_no_layer_sees_more_frames_or_rows_than_asked(self, encoder):
        values = 40_000
        most = 0

        def look(layer, inputs):
            nonlocal most
            most = max(most, inputs[0].numel())

        handles = [conv.register_forward_pre_hook(look) for conv in encoder.modules() if isinstance(conv, nn.Conv3d)]
        encoder.stagewise(video(25), values_at_once=values)
        for handle in handles:
            handle.remove()
        # A band is framed by two rows and two columns more.
        assert 0 < most < 2 * values

    def test_steps_are_reported(self, encoder):
        steps = []
        encoder.stagewise(video(7), report=lambda step, total: steps.append((step, total)))
        assert [step for step, _ in steps] == list(range(1, steps[0][1] + 1))


def test_a_batch_is_each_alone(encoder):
    clips = video(7, batch=2)
    alone = torch.cat([encoder(clips[:1]).mean, encoder(clips[1:]).mean])
    torch.testing.assert_close(encoder(clips).mean, alone, rtol=0, atol=1e-5)


def test_pixels_enter_with_their_sines_and_cosines():
    clip = video(1, height=2, width=2).double()
    features = fourier_features(clip)
    assert features.shape == (1, 15, 1, 2, 2)
    torch.testing.assert_close(features[:, :3], clip)
    angles = torch.stack([clip[:, c] * 2 * math.pi * 2**octave for c in range(3) for octave in (6, 7)], dim=1)
    torch.testing.assert_close(features[:, 3:], torch.cat([angles.sin(), angles.cos()], dim=1), rtol=0, atol=1e-10)


def test_fourier_features_are_exact_in_float32():
    clip = video(1)
    error = (fourier_features(clip).double() - fourier_features(clip.double())).abs().max()
    assert error < 5e-7


def test_features_are_made_before_the_video_is_rounded(encoder):
    half = Encoder(TINY.vae, dtype=torch.bfloat16)
    half.load_state_dict(encoder.state_dict())
    expected = encoder(video(7)).mean
    posterior = half(video(7), torch.bfloat16)
    assert posterior.mean.dtype == torch.bfloat16
    assert (posterior.mean.float() - expected).std() / expected.std() < 0.05


def test_sample_spreads_by_half_the_log_variance():
    posterior = Posterior(torch.tensor([1.0, 2.0]), torch.tensor([0.0, math.log(9)]))
    assert torch.equal(posterior.sample(torch.zeros(2)), posterior.mean)
    torch.testing.assert_close(posterior.sample(torch.ones(2)), torch.tensor([2.0, 5.0]))


class TestVideosThatDoNotFit:
    @pytest.fixture
    def refuses(self, encoder, layer_runs):
        def check(message, shape):
            runs = layer_runs(encoder)
            with pytest.raises(ShapeError, match=message):
                encoder(torch.zeros(shape))
            assert not runs

        return check

    @pytest.mark.parametrize("frames, nearest", [(2, 1), (6, 7), (26, 25)])
    def test_frames(self, refuses, frames, nearest):
        message = (
            rf"^The video has {frames} frames: there must be 6k\+1\. Cut or extend it, for example to {nearest}\.$"
        )
        refuses(message, (1, 3, frames, 16, 16))

    @pytest.mark.parametrize("shape", [(1, 3, 1, 12, 16), (1, 3, 1, 16, 20), (1, 3, 0, 16, 16), (0, 3, 1, 16, 16)])
    def test_size(self, refuses, shape):
        refuses(
            r"^The video has shape .*: it must be B x 3 x T x H x W, with H and W multiples of 8\. Crop or pad", shape
        )

    @pytest.mark.parametrize("shape", [(3, 1, 16, 16), (1, 4, 1, 16, 16), (1, 1, 1, 16, 16)])
    def test_dimensions_and_channels(self, refuses, shape):
        refuses(r"^The video has shape .*: it must be B x 3 x T x H x W", shape)


def test_every_layer_with_weights_comes_from_the_operations(marked_operations, layers_with_weights):
    layers = layers_with_weights(Encoder(TINY.vae, operations=marked_operations, device="meta"))
    assert len(layers) > 10
    assert all(hasattr(layer, "is_marked") for layer in layers.values())


def test_names_and_shapes_of_the_released_model(goldens):
    encoder = Encoder(MOCHI_1.vae, device="meta")
    shapes = {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert shapes == goldens.json("manifests")["genmo_encoder"]
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 97_222_016
