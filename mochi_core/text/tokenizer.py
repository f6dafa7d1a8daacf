"""Prompts to token ids, 256 at most."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as RustTokenizer

from ..errors import WeightsError

MAX_TOKENS = 256
PAD_ID = 0
END_ID = 1

# What a folder's tokenizer may be called, the fuller description first.
TOKENIZER_NAMES = ("tokenizer.json", "spiece.model", "tokenizer.model")


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


class Tokenizer(Protocol):
    """A T5 tokenizer: text is literal, parentheses and all."""

    @abstractmethod
    def all_ids(self, text: str) -> list[int]:
        """Every token of `text`, the end token last, however many there are."""

    @abstractmethod
    def text_of(self, ids: list[int]) -> str:
        """About the text that these tokens came from."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]: ...

    def __call__(self, text: str) -> Tokens:
        """The first 255 tokens of `text` and the end token."""
        ids = self.all_ids(text)
        if len(ids) <= MAX_TOKENS:
            return Tokens(tuple(ids), "")
        return Tokens((*ids[: MAX_TOKENS - 1], END_ID), self.text_of(ids[MAX_TOKENS - 1 : -1]))


class JsonTokenizer(Tokenizer):
    """A tokenizer from its `tokenizer.json`."""

    def __init__(self, tokenizer: RustTokenizer):
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def all_ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def text_of(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def __call__(self, text: str) -> Tokens:
        encoded = self._tokenizer.encode(text)
        if len(encoded.ids) <= MAX_TOKENS:
            return Tokens(tuple(encoded.ids), "")
        first_cut = encoded.offsets[MAX_TOKENS - 1][0]
        return Tokens((*encoded.ids[: MAX_TOKENS - 1], END_ID), text[first_cut:].strip())


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer from its `spiece.model`."""

    def __init__(self, processor: SentencePieceProcessor):
        self._processor = processor

    def all_ids(self, text: str) -> list[int]:
        return [*self._processor.encode(text), END_ID]

    def text_of(self, ids: list[int]) -> str:
        return self._processor.decode([id for id in ids if id < self._processor.get_piece_size()])

    def vocabulary(self) -> dict[str, int]:
        return {self._processor.id_to_piece(id): id for id in range(self._processor.get_piece_size())}


def read_tokenizer(path: str | Path) -> Tokenizer:
    """From a `tokenizer.json`, a `spiece.model`, or a folder with one. Raises `WeightsError` when it cannot be read."""
    file = Path(path)
    if file.is_dir():
        file = next((file / name for name in TOKENIZER_NAMES if (file / name).is_file()), file / TOKENIZER_NAMES[0])
    try:
        content = file.read_bytes()
        if content.lstrip()[:1] == b"{":
            tokenizer = JsonTokenizer(RustTokenizer.from_str(content.decode("utf-8")))
            if tokenizer.all_ids("") != [END_ID] or tokenizer.vocabulary().get("<pad>", PAD_ID) != PAD_ID:
                raise ValueError("it does not end a text with token 1, or pads with another than 0")
            return tokenizer
        processor = SentencePieceProcessor(model_proto=content)  # pyright: ignore[reportCallIssue]
        if (processor.pad_id(), processor.eos_id()) != (PAD_ID, END_ID):
            raise ValueError(f"its padding is {processor.pad_id()} and its end token {processor.eos_id()}")
        return SentencePieceTokenizer(processor)
    except Exception as error:  # both libraries raise of every kind
        raise WeightsError(
            f"{file} cannot be read as a tokenizer: {error}",
            f"a tokenizer is a T5's {', '.join(TOKENIZER_NAMES)}, or a folder with one",
            "Take the tokenizer that belongs to the text encoder",
        ) from error
