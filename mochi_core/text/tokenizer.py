"""Prompts to token ids, 256 at most."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from ..errors import WeightsError

MAX_TOKENS = 256
PAD_ID = 0
END_ID = 1


@dataclass(frozen=True)
class Tokens:
    """A prompt as the model takes it: `ids` end with the end token; `cut` is the text that did not fit."""

    ids: tuple[int, ...]
    cut: str

    @property
    def padded_ids(self) -> list[int]:
        return [*self.ids, *[PAD_ID] * (MAX_TOKENS - len(self.ids))]

    @property
    def mask(self) -> list[bool]:
        return [index < len(self.ids) for index in range(MAX_TOKENS)]


class Tokenizer:
    """A T5 tokenizer from its `tokenizer.json`: text is literal, parentheses and all."""

    def __init__(self, tokenizer: RustTokenizer):
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @classmethod
    def from_path(cls, path: str | Path) -> "Tokenizer":
        """From a `tokenizer.json`, or a folder that has one. Raises `WeightsError` when it cannot be read."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            return cls(RustTokenizer.from_str(file.read_text(encoding="utf-8")))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise WeightsError(
                f"{file} cannot be read as a tokenizer: {error}",
                "a tokenizer is a tokenizer.json, or a folder with one",
                "Take the tokenizer that belongs to the text encoder",
            ) from error

    def all_ids(self, text: str) -> list[int]:
        """Every token of `text`, the end token last, however many there are."""
        return self._tokenizer.encode(text).ids

    def text_of(self, ids: list[int]) -> str:
        """About the text that these tokens came from."""
        return self._tokenizer.decode(ids)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def __call__(self, text: str) -> Tokens:
        """The first 255 tokens of `text` and the end token."""
        encoded = self._tokenizer.encode(text)
        if len(encoded.ids) <= MAX_TOKENS:
            return Tokens(tuple(encoded.ids), "")
        first_cut = encoded.offsets[MAX_TOKENS - 1][0]
        return Tokens((*encoded.ids[: MAX_TOKENS - 1], END_ID), text[first_cut:].strip())
