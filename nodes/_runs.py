"""How long sampling took in this session, so that the page can say how long it will take."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from mochi_core.config import DiTConfig
from mochi_core.dit.flops import dit_flops, visual_tokens
from mochi_core.shapes import LatentSize
from mochi_core.text.tokenizer import MAX_TOKENS


@dataclass(frozen=True)
class Run:
    """One sampling run: `seconds` is the median of its steps."""

    config: DiTConfig
    size: LatentSize
    batch: int
    seconds: float

    def seconds_for(self, config: DiTConfig, size: LatentSize, batch: int) -> float:
        """What a step of another size would take, if time goes with the operations of a forward."""
        return self.seconds * _work(config, size, batch) / _work(self.config, self.size, self.batch)


class Runs:
    """The last run of each architecture."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[DiTConfig, Run] = {}

    def remember(self, run: Run) -> None:
        with self._lock:
            self._last[run.config] = run

    def seconds_a_step(self, config: DiTConfig, size: LatentSize, batch: int) -> float | None:
        """None before the first run of this architecture."""
        with self._lock:
            run = self._last.get(config)
        return run and run.seconds_for(config, size, batch)


RUNS = Runs()


class Steps:
    """A stopwatch around the callback of a run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._times = clock, [clock()]

    def timed(self, callback: Callable[..., None]) -> Callable[..., None]:
        def after_step(*arguments: Any) -> None:
            self._times.append(self._clock())
            callback(*arguments)

        return after_step

    @property
    def median(self) -> float | None:
        """Seconds of a step, the first left out when there are others: it holds the loading. None without a step."""
        times = [after - before for before, after in zip(self._times, self._times[1:])]
        return median(times[1:] or times) if times else None


def _work(config: DiTConfig, size: LatentSize, batch: int) -> int:
    return batch * dit_flops(config, visual_tokens(config, size), MAX_TOKENS)
