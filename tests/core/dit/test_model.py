import math

import pytest
import torch
from torch import nn

from mochi_core.attention.joint import PlainJointAttention
from mochi_core.config import MOCHI_1, TINY, DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.dit.model import compact
from mochi_core.errors import ConditioningError, KernelError, LatentsError

SMALL = DiTConfig(depth=2, heads=3, visual_dim=30, text_dim=14, text_feature_dim=24)
TOKENS = 17

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def dit(randomised):
    return randomised(AsymmDiT(SMALL))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prefix_mask(length, *counts):
    return torch.arange(length) < torch.tensor(counts)[:, None]


def prompts(*counts, length=256, padding=0.0):
    """Features of prompts of these lengths, and their mask."""
    mask = prefix_mask(length, *counts)
    features = torch.full((*mask.shape, SMALL.text_feature_dim), padding)
    for index, count in enumerate(counts):
        features[index, :count] = random(count, SMALL.text_feature_dim, seed=index + 1)
    return features, mask


class TestPadding:
    @pytest.fixture
    def latents(self):
        return random(1, 12, 2, 4, 6)

    @pytest.fixture
    def expected(self, dit, latents):
        return dit(latents, torch.tensor([0.6]), *prompts(TOKENS))

    @pytest.mark.parametrize("padding", (1.0, -1e30, math.inf, math.nan))
    def test_what_it_holds_does_not_matter(self, dit, latents, expected, padding):
        assert torch.equal(dit(latents, torch.tensor([0.6]), *prompts(TOKENS, padding=padding)), expected)

    @pytest.mark.parametrize("kind", (torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16))
    def test_the_mask_may_be_of_any_kind(self, dit, latents, expected, kind):
        features, mask = prompts(TOKENS, padding=math.nan)
        assert torch.equal(dit(latents, torch.tensor([0.6]), features, mask.to(kind)), expected)

    @pytest.mark.parametrize("length", (TOKENS, 40, 300))
    def test_the_length_does_not_matter(self, dit, latents, expected, length):
        assert torch.equal(dit(latents, torch.tensor([0.6]), *prompts(TOKENS, length=length)), expected)

    def test_real_tokens_may_be_anywhere(self, dit, latents, expected):
        places = torch.randperm(256, generator=torch.Generator().manual_seed(5))[:TOKENS].sort().values
        features, mask = torch.full((1, 256, SMALL.text_feature_dim), math.nan), torch.zeros(1, 256, dtype=torch.bool)
        features[:, places], mask[:, places] = prompts(TOKENS)[0][:, :TOKENS], True
        assert torch.equal(dit(latents, torch.tensor([0.6]), features, mask), expected)

    def test_the_order_of_tokens_means_nothing(self, dit, latents, expected):
        features, mask = prompts(TOKENS)
        features[:, :TOKENS] = features[:, :TOKENS].flip(1)
        torch.testing.assert_close(dit(latents, torch.tensor([0.6]), features, mask), expected, rtol=0, atol=1e-5)

    def test_the_empty_prompt_may_be_no_features_at_all(self, dit, latents):
        masked = dit(latents, torch.tensor([0.6]), *prompts(0, padding=math.nan))
        none = dit(latents, torch.tensor([0.6]), *prompts(0, length=0))
        assert masked.isfinite().all()
        assert torch.equal(masked, none)


def test_compact_moves_real_tokens_to_the_front():
    features = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[False, True, False, True, False], [False, False, False, False, True]])
    features, mask = compact(features, mask)
    assert features.flatten(1).tolist() == [[1, 3], [9, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("counts", [(17, 5), (0, 9), (3, 0, 256)])
def test_a_batch_of_unequal_prompts_is_each_alone(dit, counts):
    latents, sigma = random(len(counts), 12, 2, 4, 4), torch.linspace(0.1, 0.9, len(counts))
    features, mask = prompts(*counts, padding=math.nan)
    together = dit(latents, sigma, features, mask)
    for index in range(len(counts)):
        one = slice(index, index + 1)
        alone = dit(latents[one], sigma[one], features[one], mask[one])
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


CONFIGS = (
    SMALL,
    DiTConfig(depth=1, heads=1, visual_dim=2, text_dim=1, text_feature_dim=8),
    DiTConfig(depth=3, heads=5, visual_dim=70, text_dim=9, text_feature_dim=16, visual_mlp_ratio=1.5),
    DiTConfig(depth=2, heads=7, visual_dim=14, text_dim=33, text_feature_dim=40, latent_channels=5, patch_size=1),
    DiTConfig(depth=1, heads=2, visual_dim=260, text_dim=6, text_feature_dim=8, patch_size=4, timestep_scale=10.0),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.heads} heads of {c.head_dim}")
@pytest.mark.parametrize("precision", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("batch, frames", [(1, 1), (2, 3), (3, 1)])
def test_any_sizes_that_divide_run(randomised, config, precision, batch, frames):
    dit = randomised(AsymmDiT(config, dtype=precision))
    latents = random(batch, config.latent_channels, frames, 8, 4).to(precision)
    counts = ([4], [0, 6], [2, 0, 5])[batch - 1]
    features, mask = random(batch, 6, config.text_feature_dim), prefix_mask(6, *counts)
    out = dit(latents, torch.full((batch,), 0.5), features, mask)
    assert out.shape == latents.shape and out.dtype == precision
    assert out.isfinite().all()


@pytest.mark.parametrize("precision, error", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_is_near(golden_dit, goldens, precision, error):
    case = goldens.tensors("dit_cases")
    dit = AsymmDiT(golden_dit(torch.float32).config, dtype=precision)
    dit.load_state_dict(goldens.tensors("dit_weights"))
    text = goldens.text(case, "in/b1/", precision)
    out = dit(case["in/b1/x"].to(precision), case["in/b1/sigma"], *text)
    expected = case["out_f64/b1/out"]
    assert (out.double() - expected).std() / expected.std() < error


class TestExtensionPoints:
    inputs = (random(1, 12, 2, 4, 4), torch.tensor([0.5]), *prompts(5))

    def test_joint_attention_is_replaced_on_a_finished_model(self, dit):
        expected, calls = dit(*self.inputs), []

        def joint(visual, text, text_mask):
            calls.append((visual.q.shape[1], text.q.shape[1], text_mask))
            return PlainJointAttention("reference")(visual, text, text_mask)

        for block in dit.blocks:
            block.attn.joint = joint
        torch.testing.assert_close(dit(*self.inputs), expected, rtol=0, atol=1e-5)
        assert calls == [(8, 5, None)] * SMALL.depth
        assert "joint" not in "".join(dit.state_dict())

    def test_joint_attention_decides_what_is_seen(self, dit):
        """Attending within each frame only: the last frame of the noise cannot reach the first."""

        def within_frames(visual, text, text_mask):
            frames = [type(visual)(*(x[:, part] for x in visual)) for part in (slice(0, 4), slice(4, 8))]
            outs = [PlainJointAttention()(frame, text, text_mask) for frame in frames]
            return torch.cat([out[0] for out in outs], dim=1), outs[0][1]

        for block in dit.blocks:
            block.attn.joint = within_frames
        latents, *rest = self.inputs
        changed = latents.clone()
        changed[:, :, 1] += 1
        difference = (dit(changed, *rest) - dit(latents, *rest)).abs().amax(dim=(0, 1, 3, 4))
        assert difference[0] == 0 and difference[1] > 0.01

    def test_run_block_is_around_every_block(self, dit):
        seen = []

        def run_block(index, block, *inputs):
            seen.append((index, block))
            return block(*inputs)

        assert torch.equal(dit(*self.inputs, run_block=run_block), dit(*self.inputs))
        assert seen == list(enumerate(dit.blocks))

    def test_every_layer_with_weights_comes_from_the_operations(self, marked_operations, layers_with_weights):
        layers = layers_with_weights(AsymmDiT(SMALL, operations=marked_operations, device="meta"))
        assert layers.pop("").pos_frequencies is not None  # the model's own and only parameter
        assert len(layers) > 30
        assert all(hasattr(layer, "is_marked") for layer in layers.values())


class TestInputsThatDoNotFit:
    @pytest.fixture
    def refuses(self, dit, layer_runs):
        """`refuses(kind, message, latents, features, mask)`: raises before any layer runs."""

        def check(kind, message, latents, features, mask):
            runs = layer_runs(dit)
            with pytest.raises(kind, match=message):
                dit(latents, torch.ones(len(latents)), features, mask)
            assert not runs

        return check

    @pytest.mark.parametrize(
        "shape", [(1, 16, 1, 4, 4), (1, 12, 4, 4), (1, 12, 1, 3, 4), (1, 12, 1, 4, 5), (1, 12, 1, 0, 4)]
    )
    def test_latents(self, refuses, shape):
        message = r"they must be B x 12 x T x H x W, with H and W multiples of 2\. Use width and height"
        refuses(LatentsError, message, torch.zeros(shape), *prompts(3))

    @pytest.mark.parametrize("shape", [(1, 5, 4096), (1, 24), (1, 1, 5, 24)])
    def test_features_of_another_text_encoder(self, refuses, shape):
        message = (
            r"^The text features have shape .*: this DiT reads features of width 24\. Encode the prompt with the T5"
        )
        refuses(ConditioningError, message, torch.zeros(1, 12, 1, 4, 4), torch.zeros(shape), torch.ones(shape[:2]))

    @pytest.mark.parametrize("mask", [torch.ones(1, 4), torch.ones(2, 5), torch.ones(5)])
    def test_mask(self, refuses, mask):
        message = r"^The text mask has shape .*: mask and features must agree, one prompt for each latent\. Encode"
        refuses(ConditioningError, message, torch.zeros(1, 12, 1, 4, 4), torch.zeros(1, 5, 24), mask)

    def test_more_latents_than_prompts(self, refuses):
        refuses(ConditioningError, "the latents a batch of 2: ", torch.zeros(2, 12, 1, 4, 4), *prompts(3))

    @pytest.mark.parametrize("batch, frames", [(0, 1), (1, 0)])
    def test_no_latents(self, refuses, batch, frames):
        refuses(
            LatentsError,
            "have shape",
            torch.zeros(batch, 12, frames, 4, 4),
            torch.zeros(batch, 5, 24),
            torch.ones(batch, 5),
        )

    def test_unknown_attention_kernel(self):
        with pytest.raises(KernelError, match="attention is 'magic': it must be one of auto, flash, reference"):
            PlainJointAttention("magic")


def test_names_and_shapes_of_the_released_model(goldens):
    dit = AsymmDiT(MOCHI_1.dit, device="meta")
    assert {name: list(tensor.shape) for name, tensor in dit.state_dict().items()} == goldens.json("manifests")[
        "genmo_dit"
    ]
    assert sum(parameter.numel() for parameter in dit.parameters()) == 10_027_677_744


def test_the_tiny_model_trains():
    """Everything learns, the frequencies too; only the last block's text queries have no one to ask for."""
    with torch.enable_grad():
        dit = AsymmDiT(TINY.dit)
        nn.init.normal_(dit.pos_frequencies)
        out = dit(random(1, 12, 1, 4, 4), torch.tensor([0.5]), random(1, 4, 64), torch.ones(1, 4))
        out.square().mean().backward()
    without = {name for name, parameter in dit.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert without == {"blocks.3.attn.q_norm_y.weight"}
