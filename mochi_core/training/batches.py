"""Which clips each micro-batch of a training is made of: a function of its index, so that nothing need be kept."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from ..errors import DatasetError, TrainingError
from .dataset import Clip

Batch = tuple[Clip, ...]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Order:
    """An endless run over clips: `order[index]` is the `index`-th micro-batch, of clips of one size.

    Every epoch has each clip once, newly shuffled; a size's last batch may be smaller. The same clips, in whatever
    order, batch size and seed give the same run on every machine.

    Raises `DatasetError` without clips and `TrainingError` on a batch size below 1.
    """

    clips: Sequence[Clip]
    batch_size: int
    seed: int
    _latest: dict[int, tuple[Batch, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.clips:
            raise DatasetError("There is no clip", "there must be one to learn from", "Prepare some")
        if self.batch_size < 1:
            raise TrainingError(f"The batch size is {self.batch_size}", "it must be at least 1", "Use 1")

    @cached_property
    def batches_per_epoch(self) -> int:
        return sum(-(-len(clips) // self.batch_size) for clips in self._buckets.values())

    def epoch(self, index: int) -> int:
        """The epoch that the `index`-th micro-batch is of, from 0 on."""
        return index // self.batches_per_epoch

    def __getitem__(self, index: int) -> Batch:
        if index < 0:
            raise IndexError(f"micro-batch {index} of a run that starts with 0")
        epoch, place = divmod(index, self.batches_per_epoch)
        if epoch not in self._latest:
            batches = self._shuffled(epoch)
            self._latest.clear()
            self._latest[epoch] = batches
        return self._latest[epoch][place]

    @cached_property
    def _buckets(self) -> dict[str, list[Clip]]:
        """The clips of each size, sizes and clips by name."""
        buckets: dict[str, list[Clip]] = {}
        for clip in sorted(self.clips, key=lambda clip: clip.name):
            size = clip.size
            buckets.setdefault(f"{size.width}x{size.height}x{size.frames}", []).append(clip)
        return dict(sorted(buckets.items()))

    def _shuffled(self, epoch: int) -> tuple[Batch, ...]:
        batches: list[Batch] = []
        for size, bucket in self._buckets.items():
            clips = self._mixed(bucket, epoch, size)
            batches += [tuple(clips[i : i + self.batch_size]) for i in range(0, len(clips), self.batch_size)]
        return tuple(self._mixed(batches, epoch, "batches"))

    def _mixed(self, items: list[Item], epoch: int, what: str) -> list[Item]:
        """Sorted by hashes of their places: the same on every machine, with every version of every generator."""

        def key(place: int) -> bytes:
            return hashlib.sha256(f"{self.seed} {epoch} {what} {place}".encode()).digest()

        return [items[place] for place in sorted(range(len(items)), key=key)]
