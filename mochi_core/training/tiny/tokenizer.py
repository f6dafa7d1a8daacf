"""The tokenizer: a unigram model whose pieces and scores are written here, whole words before letters.

The trainer of such models falls back to letters on so small a language.
"""

import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from ...weights.writer import write_whole
from . import scenes

SPACE = "\u2581"
SPECIAL = ("<pad>", "</s>", "<unk>")
WORD_SCORE, LETTER_SCORE = -5.0, -12.0
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
MARKS = ",.:;!?'\"()-"
# Words of other prompts, so that not everything unknown goes to letters.
OTHER_WORDS = "the it its with at in from to by small large big slowly fast bright dark top bottom one two and that"


def words() -> list[str]:
    """Every word that a caption can have, then some others; each once."""
    texts = [re.sub(r"\{\w+\}", " ", template) for template in scenes.TEMPLATES]
    for some in (scenes.COLOUR_WORDS, scenes.SHAPE_WORDS, scenes.MOTION_WORDS, scenes.BACKGROUND_WORDS):
        texts += [word for group in some.values() for word in group]
    texts += ["a an", OTHER_WORDS]
    return list(dict.fromkeys(re.findall(r"[a-z]+", " ".join(texts))))


def pieces() -> list[tuple[str, float]]:
    """The vocabulary with its scores, in the order of the ids."""
    begun = [(SPACE + word, WORD_SCORE) for word in words() if len(word) > 1]
    letters = [(letter, LETTER_SCORE) for letter in (*LETTERS, *MARKS)]
    begun_letters = [(SPACE + letter, LETTER_SCORE) for letter in (*LETTERS, *MARKS)]
    return [*((piece, 0.0) for piece in SPECIAL), *begun, *begun_letters, *letters, (SPACE, LETTER_SCORE)]


def new_tokenizer() -> Tokenizer:
    """Lower case; a text ends with the end token."""
    vocabulary = pieces()
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def write_tokenizer(path: Path) -> None:
    write_whole(path, new_tokenizer().to_str(pretty=True).encode())
