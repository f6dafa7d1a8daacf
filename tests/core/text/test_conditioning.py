import pytest
import torch

from mochi_core.errors import ConditioningError
from mochi_core.text.conditioning import TextConditioning, warn_of_cut
from mochi_core.text.tokenizer import Tokens


@pytest.fixture
def encode(tiny):
    return tiny.text_encoder


def conditioning(prompts, length=4, fill=0.0):
    return TextConditioning(torch.full((prompts, length, 2), fill), torch.ones(prompts, length, dtype=torch.bool))


class TestEncoder:
    def test_features_and_mask(self, encode):
        text = encode(["a red circle"])
        count = len(encode.tokenizer("a red circle").ids)
        assert text.features.shape == (1, 256, 64) and text.features.dtype == torch.float32
        assert text.mask.dtype == torch.bool and text.mask.sum() == count and text.mask[0, :count].all()
        assert text.features.isfinite().all() and text.features[:, :count].std() > 0.05

    def test_the_empty_prompt_is_no_token_and_zeros(self, encode):
        text = encode([""])
        assert not text.mask.any() and not text.features.any()

    def test_a_blank_prompt_is_not_the_null_prompt(self, encode):
        assert encode([" "]).mask.sum() == 1

    def test_several_prompts_are_each_alone(self, encode):
        prompts = ["a red circle", "", "a blue box moving left on a white background"]
        together = encode(prompts)
        for index, prompt in enumerate(prompts):
            alone = encode([prompt])
            assert torch.equal(together.mask[index], alone.mask[0])
            real = alone.mask[0]
            torch.testing.assert_close(together.features[index, real], alone.features[0, real], rtol=0, atol=1e-5)

    def test_what_does_not_fit_is_cut_and_said(self, encode, caplog):
        text = encode(["red " * 5000 + "zebra"])
        assert text.mask.all()
        assert "longer than 256 tokens; the model will not see its last 4746 words: 'red red " in caplog.text
        assert caplog.text.rstrip().endswith("red zebra'")
        assert len(caplog.text) < 500

    def test_what_fits_is_not_remarked_on(self, encode, caplog):
        encode(["a red circle", ""])
        assert caplog.text == ""


def test_warning_quotes_the_cut_text():
    assert warn_of_cut(Tokens((1,), "")) is None
    message = "The prompt is longer than 256 tokens; the model will not see its last 2 words: 'the end'"
    assert warn_of_cut(Tokens((1,), "the end")) == message


def test_one_prompt_serves_any_batch():
    repeated = conditioning(1).repeated(3)
    assert repeated.features.shape == (3, 4, 2) and repeated.mask.shape == (3, 4)
    assert conditioning(3).repeated(3).features.shape == (3, 4, 2)


@pytest.mark.parametrize("prompts, batch", [(2, 3), (3, 1)])
def test_prompts_that_do_not_match_the_batch(prompts, batch):
    with pytest.raises(
        ConditioningError, match=rf"There are {prompts} prompts for {batch} latents: there must be one, or"
    ):
        conditioning(prompts).repeated(batch)


def test_joined_are_these_then_the_others():
    joined = conditioning(1, fill=1.0).joined(conditioning(2, fill=2.0))
    assert joined.features[:, 0, 0].tolist() == [1, 2, 2] and joined.mask.shape == (3, 4)


@pytest.mark.parametrize(
    "features, mask", [((4, 2), (4,)), ((1, 4, 2), (1, 5)), ((2, 4, 2), (1, 4)), ((1, 4, 2), (4,))]
)
def test_features_and_mask_must_agree(features, mask):
    with pytest.raises(
        ConditioningError, match=r"The features have shape .*, the mask .*: they must be B x L x C and B x L"
    ):
        TextConditioning(torch.zeros(features), torch.zeros(mask))
