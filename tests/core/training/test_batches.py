from itertools import pairwise
from pathlib import Path

import pytest

from mochi_core.errors import DatasetError, TrainingError
from mochi_core.shapes import VideoSize
from mochi_core.training.batches import Order
from mochi_core.training.dataset import Clip

WIDE, TALL = VideoSize(64, 32, 7), VideoSize(32, 64, 7)


def clips(wide=7, tall=5):
    sizes = [WIDE] * wide + [TALL] * tall
    return tuple(Clip(f"{n:02}.mp4", size, "", Path(f"{n}.safetensors")) for n, size in enumerate(sizes))


def epoch(order, number):
    count = order.batches_per_epoch
    return [order[index] for index in range(number * count, (number + 1) * count)]


def names(batches):
    return [clip.name for batch in batches for clip in batch]


@pytest.mark.parametrize("batch_size, count", [(1, 12), (2, 7), (3, 5), (5, 3), (99, 2)])
def test_every_clip_once_an_epoch(batch_size, count):
    order = Order(clips(), batch_size, seed=3)
    assert order.batches_per_epoch == count
    for number in range(4):
        assert sorted(names(epoch(order, number))) == [clip.name for clip in clips()]


def test_a_batch_has_one_size_and_is_full_but_for_the_last():
    order = Order(clips(), 3, seed=0)
    batches = epoch(order, 0) + epoch(order, 1)
    assert all(len({clip.size for clip in batch}) == 1 for batch in batches)
    for size, lengths in ((WIDE, [1, 1, 3, 3, 3, 3]), (TALL, [2, 2, 3, 3])):
        assert sorted(len(batch) for batch in batches if batch[0].size == size) == lengths


def test_epochs_and_seeds_are_shuffled_differently():
    order, other = Order(clips(), 1, seed=0), Order(clips(), 1, seed=1)
    runs = [tuple(names(epoch(order, n))) for n in range(5)] + [tuple(names(epoch(other, n))) for n in range(5)]
    assert len(set(runs)) == 10


def test_sizes_are_mixed_within_an_epoch():
    sizes = [batch[0].size for batch in epoch(Order(clips(20, 20), 1, seed=0), 0)]
    assert sum(a != b for a, b in pairwise(sizes)) > 8


def test_batches_are_mixed_anew_and_not_only_their_order():
    order = Order(clips(), 3, seed=0)
    first, second = ({frozenset(clip.name for clip in batch) for batch in epoch(order, n)} for n in (0, 1))
    assert first != second


def test_a_batch_depends_on_its_index_alone():
    order = Order(clips(), 2, seed=7)
    ahead = [order[index] for index in range(30)]
    assert [Order(clips(), 2, seed=7)[index] for index in reversed(range(30))] == ahead[::-1]
    assert [Order(clips()[::-1], 2, seed=7)[index] for index in range(30)] == ahead, "nor on the order of the clips"


# Written down once: a training that is resumed on another machine must see this too.
EVERYWHERE = ["01.mp4", "00.mp4", "02.mp4", "03.mp4", "04.mp4"]


def test_it_is_the_same_everywhere():
    assert names(epoch(Order(clips(3, 2), 2, seed=0), 0)) == EVERYWHERE


def test_every_place_comes_first_about_as_often():
    firsts = [names([Order(clips(4, 0), 1, seed)[0]])[0] for seed in range(400)]
    assert all(60 < firsts.count(clip.name) < 140 for clip in clips(4, 0))


def test_epochs_are_counted():
    order = Order(clips(), 3, seed=0)
    assert [order.epoch(index) for index in (0, 4, 5, 9, 10, 5000)] == [0, 0, 1, 1, 2, 1000]


def test_an_epoch_is_shuffled_once(monkeypatch):
    order, count = Order(clips(), 2, seed=0), []
    shuffled = Order._shuffled
    monkeypatch.setattr(Order, "_shuffled", lambda self, epoch: count.append(epoch) or shuffled(self, epoch))
    for index in range(14):
        assert order[index]
    assert count == [0, 1]


def test_what_is_no_order():
    with pytest.raises(DatasetError, match="There is no clip"):
        Order((), 1, 0)
    with pytest.raises(TrainingError, match="The batch size is 0"):
        Order(clips(), 0, 0)
    with pytest.raises(IndexError):
        Order(clips(), 1, 0)[-1]
