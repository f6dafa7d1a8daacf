import pytest

from mochi_core.errors import WeightsError
from mochi_core.text.tokenizer import END_ID, MAX_TOKENS, PAD_ID, read_tokenizer
from mochi_core.weights.build import TINY_ASSETS, TINY_TOKENIZER, load_tiny_tokenizer

LONG = "a red circle moving right " * 1000


@pytest.fixture(scope="module")
def tokenizer():
    return load_tiny_tokenizer()


def test_a_prompt_ends_with_the_end_token(tokenizer):
    tokens = tokenizer("a red circle")
    assert tokens.ids[-1] == END_ID and END_ID not in tokens.ids[:-1]
    assert tokens.cut == ""
    assert list(tokens.ids) == tokenizer.all_ids("a red circle")


def test_padding_and_mask(tokenizer):
    tokens = tokenizer("a red circle")
    count = len(tokens.ids)
    assert len(tokens.padded_ids) == len(tokens.mask) == MAX_TOKENS
    assert tokens.padded_ids == [*tokens.ids, *[PAD_ID] * (MAX_TOKENS - count)]
    assert tokens.mask == [True] * count + [False] * (MAX_TOKENS - count)


def test_five_thousand_words_are_cut(tokenizer):
    assert len(LONG.split()) == 5000
    tokens = tokenizer(LONG)
    assert len(tokens.ids) == MAX_TOKENS and tokens.ids[-1] == END_ID
    assert all(tokens.mask) and len(tokens.padded_ids) == MAX_TOKENS
    assert len(tokenizer.all_ids(LONG)) > 5000


def test_what_was_cut_is_exactly_what_the_model_will_not_see(tokenizer):
    tokens = tokenizer(LONG)
    assert LONG.rstrip().endswith(tokens.cut)
    kept = LONG.rstrip().removesuffix(tokens.cut)
    assert tokenizer.all_ids(kept) == list(tokens.ids)


def test_exactly_as_many_tokens_as_fit(tokenizer):
    words = ["red"] * (MAX_TOKENS - 1)
    fits, one_more = tokenizer(" ".join(words)), tokenizer(" ".join([*words, "blue"]))
    assert len(fits.ids) == MAX_TOKENS and fits.cut == ""
    assert one_more.ids == fits.ids and one_more.cut == "blue"


@pytest.mark.parametrize("text", ("", "   ", "\n"))
def test_blank_text_is_the_end_token_alone(tokenizer, text):
    assert tokenizer(text).ids == (END_ID,)


def test_text_is_literal(tokenizer):
    """No weights in parentheses, no wildcards: brackets are tokens like any other."""
    plain, brackets = tokenizer("red circle").ids, tokenizer("(red:1.3) circle").ids
    assert len(brackets) > len(plain)


def test_other_scripts_and_symbols_pass(tokenizer):
    assert tokenizer("红色圆形 🔴 é \x00").ids[-1] == END_ID


def test_from_a_folder(tokenizer):
    assert read_tokenizer(TINY_ASSETS).vocabulary() == tokenizer.vocabulary()
    assert tokenizer.vocabulary()["</s>"] == END_ID and tokenizer.vocabulary()["<pad>"] == PAD_ID


@pytest.mark.parametrize("content", (None, "", "{}", "not json", '{"model": 5}'))
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    for given in (path, tmp_path):
        with pytest.raises(
            WeightsError, match=r"tokenizer.json cannot be read as a tokenizer: .*Take the tokenizer that"
        ):
            read_tokenizer(given)


def test_a_truncated_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(TINY_TOKENIZER.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="cannot be read as a tokenizer"):
        read_tokenizer(path)
