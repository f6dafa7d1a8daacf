"""The text encoder, for captions and prompts of a training: there while it reads, in the memory that there is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..memory.plan import MemoryPolicy, placed, text_plan
from ..text.conditioning import TextEncoder
from ..text.tokenizer import read_tokenizer
from ..weights import build
from ..weights.files import Unchanged


@contextmanager
def reading(t5: Path, tokenizer: Path, memory: MemoryPolicy, dtype: torch.dtype | None = None) -> Iterator[TextEncoder]:
    """The text encoder of these files, with as many blocks on the device as fit, as long as the block runs."""
    unchanged = Unchanged(t5)
    model: Any = build.load_t5(t5, dtype=dtype)
    how = text_plan(model, memory.budget_now, memory.device, host_bytes=memory.host_bytes)
    with placed(model, model.encoder.block, how, memory.device, unchanged):
        yield TextEncoder(model, read_tokenizer(tokenizer))
