"""Prompts to what the DiT reads, by the rules it was trained with.

At most 256 tokens; what does not fit is cut and said. The empty prompt is the model's null prompt: no token at all.

Shapes: `B` prompts, `L` = 256 tokens, `C` feature width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import T5EncoderModel

from ..errors import ConditioningError
from .tokenizer import MAX_TOKENS, Tokenizer, Tokens

log = logging.getLogger(__name__)

# How many characters of a cut text a warning quotes.
CUT_SHOWN = 240


@dataclass(frozen=True)
class TextConditioning:
    """Features of one or more prompts: `features` is `B L C`, `mask` is `B L`, true for real tokens."""

    features: torch.Tensor
    mask: torch.Tensor

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or self.mask.shape != self.features.shape[:2]:
            raise ConditioningError(
                f"The features have shape {tuple(self.features.shape)}, the mask {tuple(self.mask.shape)}",
                "they must be B x L x C and B x L",
                "Encode prompt and mask together",
            )

    def repeated(self, batch: int) -> "TextConditioning":
        """One prompt for each of `batch` latents; a single prompt serves them all."""
        if len(self.mask) not in (1, batch):
            raise ConditioningError(
                f"There are {len(self.mask)} prompts for {batch} latents",
                "there must be one, or one for each",
                "Match them",
            )
        return TextConditioning(self.features.expand(batch, -1, -1), self.mask.expand(batch, -1))

    def joined(self, other: "TextConditioning") -> "TextConditioning":
        """These prompts, then the others."""
        return TextConditioning(torch.cat([self.features, other.features]), torch.cat([self.mask, other.mask]))


def warn_of_cut(tokens: Tokens) -> str | None:
    """Logs and returns what of a prompt did not fit, None when all did."""
    if not tokens.cut:
        return None
    words = len(tokens.cut.split())
    shown = tokens.cut if len(tokens.cut) <= CUT_SHOWN else f"{tokens.cut[: CUT_SHOWN - 60]} ... {tokens.cut[-50:]}"
    message = f"The prompt is longer than {MAX_TOKENS} tokens; the model will not see its last {words} words: {shown!r}"
    log.warning(message)
    return message


@dataclass(frozen=True)
class TextEncoder:
    """A T5 encoder with its tokenizer."""

    model: T5EncoderModel
    tokenizer: Tokenizer

    @property
    def width(self) -> int:
        """How wide its features are."""
        return self.model.config.d_model

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> TextConditioning:
        """Features of each prompt, in float32. The empty prompt has none: all zero, nothing to attend to."""
        device = next(self.model.parameters()).device
        tokens = [self.tokenizer(prompt) if prompt else Tokens((), "") for prompt in prompts]
        for prompt in tokens:
            warn_of_cut(prompt)
        ids = torch.tensor([t.padded_ids for t in tokens], device=device)
        mask = torch.tensor([t.mask for t in tokens], device=device)
        features = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        return TextConditioning(features.masked_fill(~mask.any(1)[:, None, None], 0), mask)
