import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordLevel

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


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A folder with a small SentencePiece model, its special tokens as T5 has them."""
    folder = tmp_path_factory.mktemp("spiece")
    sentences = [f"a {colour} {shape} moving {way}" for colour in ("red", "green", "blue", "cyan")
                 for shape in ("circle", "square", "triangle") for way in ("left", "right", "up", "down")]  # fmt: skip
    train(folder / "spiece.model", sentences, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    return folder


def train(path, sentences, **options):
    with path.open("wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=30, minloglevel=2, **options
        )


@pytest.mark.parametrize("name", ("", "spiece.model"))
def test_a_sentencepiece_model(spiece, name):
    tokenizer = read_tokenizer(spiece / name)
    expected = SentencePieceProcessor(model_file=str(spiece / "spiece.model")).encode("a red circle moving left")
    tokens = tokenizer("a red circle moving left")
    assert tokens.ids == (*expected, END_ID) and tokens.cut == ""
    assert tokenizer.vocabulary()["</s>"] == END_ID and len(tokenizer.vocabulary()) == 30
    assert tokenizer.text_of(list(tokens.ids[:-1])) == "a red circle moving left"


def test_a_sentencepiece_model_cuts_and_says_what(spiece):
    tokenizer = read_tokenizer(spiece)
    tokens = tokenizer(LONG)
    assert len(tokens.ids) == MAX_TOKENS and tokens.ids[-1] == END_ID
    assert tokens.ids[:-1] == tuple(tokenizer.all_ids(LONG)[: MAX_TOKENS - 1])
    assert LONG.strip().endswith(tokens.cut) and tokens.cut


def test_a_sentencepiece_model_with_other_special_tokens_is_refused(spiece, tmp_path):
    train(
        tmp_path / "llama.model",
        ["a red circle", "a blue square on the left"] * 9,
        pad_id=-1,
        eos_id=2,
        hard_vocab_limit=False,
    )
    with pytest.raises(WeightsError, match="its padding is -1 and its end token 2"):
        read_tokenizer(tmp_path / "llama.model")


def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path):
    """It would encode every prompt without an end token."""
    words = WordLevel({"red": 0, "circle": 1, "a": 2}, unk_token="a")
    RustTokenizer(words).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(WeightsError, match="does not end a text with token 1"):
        read_tokenizer(tmp_path)


def test_a_truncated_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(TINY_TOKENIZER.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="cannot be read as a tokenizer"):
        read_tokenizer(path)
