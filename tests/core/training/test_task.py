"""What a micro-batch of clips becomes."""

import torch

from mochi_core.text.conditioning import TextEncoder
from mochi_core.text.tokenizer import read_tokenizer
from mochi_core.training.config import Data
from mochi_core.training.dataset import Dataset
from mochi_core.training.task import Batches
from mochi_core.weights.build import TINY_T5, TINY_TOKENIZER, load_t5


def batches(folder, seed=0, **options):
    dataset = Dataset.open(folder)
    return Batches(dataset, dataset.statistics, Data(**options), seed)


def test_a_function_of_its_index(prepared_clips):
    one, other = batches(prepared_clips), batches(prepared_clips)
    other[5]
    for index in (0, 3, 1):
        first, second = one[index], other[index]
        assert first.clips == second.clips and torch.equal(first.noise, second.noise)
        assert torch.equal(first.clean, second.clean) and torch.equal(first.sigma, second.sigma)
    assert not torch.equal(one[0].noise, batches(prepared_clips, seed=1)[0].noise)


def test_clean_latents_are_draws_of_the_posterior_in_model_space(prepared_clips):
    made = batches(prepared_clips, batch_size=3, caption_dropout=0)
    dataset = made.dataset
    draws = torch.stack([made[index].clean[sorted(range(3), key=made[index].clips.__getitem__)] for index in range(40)])
    by_name = sorted((dataset.load(clip) for clip in dataset.clips), key=lambda sample: sample.name)
    mean = dataset.statistics.to_model_space(torch.stack([sample.mean for sample in by_name]))
    deviation = torch.stack([torch.exp(0.5 * sample.logvar) for sample in by_name])
    deviation = deviation / torch.tensor(dataset.statistics.std).view(-1, 1, 1, 1)
    score = ((draws - mean) / deviation).flatten()
    assert abs(score.mean()) < 0.02 and abs(score.std() - 1) < 0.02
    assert not torch.equal(draws[0], draws[1])


def test_captions_are_those_of_the_clips(prepared_clips):
    made = batches(prepared_clips, batch_size=3, caption_dropout=0)[0]
    encoder = TextEncoder(load_t5(TINY_T5, dtype=torch.float32), read_tokenizer(TINY_TOKENIZER))
    captions = {clip.name: clip.caption for clip in Dataset.open(prepared_clips).clips}
    text = encoder([captions[name] for name in made.clips])
    tokens = made.mask.shape[1]
    assert torch.equal(text.mask[:, :tokens], made.mask) and not text.mask[:, tokens:].any()
    torch.testing.assert_close(
        text.features[:, :tokens].clone()[made.mask], made.features[made.mask], atol=1e-4, rtol=0
    )


def test_dropped_caption_is_the_null_prompt(prepared_clips):
    made = batches(prepared_clips, batch_size=3, caption_dropout=1)[0]
    assert not made.mask.any() and not made.features.any()
    many = batches(prepared_clips, batch_size=3, caption_dropout=0.3)
    dropped = torch.cat([~many[index].mask.any(1) for index in range(200)]).float().mean().item()
    assert 0.24 < dropped < 0.36


def test_single_clip_fills_the_batch(prepared_clips):
    made = batches(prepared_clips, batch_size=4, single_clip=True)
    assert len(made[0].clips) == 4 and len(set(made[0].clips) | set(made[9].clips)) == 1
