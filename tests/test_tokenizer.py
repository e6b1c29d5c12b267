"""The tokenizer: fixed length, padding, lower case, determinism, and files that are no model."""

import io

import numpy as np
import pytest
import sentencepiece

from limoe.data.files import DataError
from limoe.data.inputs import cut_captions
from limoe.data.source import Decoded, Source
from limoe.data.tokenizer import PAD_ID, UNKNOWN_ID, Tokenizer, load_tokenizer, train_tokenizer

CAPTIONS = [
    f"{count} {size} {colour} {shape}"
    for count in ("a", "one", "two")
    for size in ("small", "large", "tiny")
    for colour in ("red", "blue", "green", "grün")
    for shape in ("ring", "square", "star", "日本")
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=100, length=24)


def test_tokens_have_a_fixed_shape_and_are_padded_at_the_end(tokenizer):
    tokens = tokenizer.encode(["a red ring", "two large green squares " * 20, "star"])
    assert tokens.shape == (3, 24) and tokens.dtype == np.int32
    assert tokens[0, -1] == PAD_ID and tokens[0, 0] != PAD_ID
    assert (tokens[1] != PAD_ID).all()
    assert tokens.max() < tokenizer.vocab_size <= 100
    for row in tokens:
        used = int((row != PAD_ID).sum())
        assert (row[used:] == PAD_ID).all()


LENGTHS = ["a red ring", "a red ring and a star", "two large blue squares and a tiny star", "one", "a red ring"]


class Captions(Source):
    """Captions alone."""

    def __init__(self):
        pass

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, number):
        return Decoded(np.zeros((1, 1, 3), np.uint8), LENGTHS[number], str(number), None)


def test_captions_that_are_cut_are_counted_and_told(tokenizer):
    lengths = (tokenizer.encode(LENGTHS) != PAD_ID).sum(axis=1)
    whole = Tokenizer(tokenizer.model, length=int(lengths.max()))
    assert whole.num_cut(LENGTHS) == 0 and cut_captions(Captions(), whole) == []
    short = Tokenizer(tokenizer.model, length=int(lengths[0]))
    assert short.num_cut(LENGTHS) == 2
    (note,) = cut_captions(Captions(), short)
    assert note.startswith(f"2 of 5 captions looked at (40.0%) have more than model.text_length={lengths[0]} tokens")


def test_case_and_spaces_do_not_matter(tokenizer):
    tokens = tokenizer.encode(["A Large GRÜN\n ring ", "a large grün ring", "a large grun ring"])
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert (tokens[0] != tokens[2]).any()


@pytest.mark.parametrize("caption", ["", " ", "\u200b", "\x00", "🦊🦊", "Ωμέγα", "\u202eabc", "a" * 100_000])
def test_odd_captions_give_at_least_one_token_and_no_padding_before_it(tokenizer, caption):
    tokens = tokenizer.encode([caption])
    assert tokens.shape == (1, 24)
    assert tokens[0, 0] != PAD_ID


def test_unknown_characters_are_the_unknown_token(tokenizer):
    assert UNKNOWN_ID in tokenizer.encode(["Ω"])[0]


def test_no_captions_give_no_rows(tokenizer):
    assert tokenizer.encode([]).shape == (0, 24)


def test_the_same_captions_train_the_same_model(tokenizer):
    assert train_tokenizer(iter(CAPTIONS), vocab_size=100, length=8).model == tokenizer.model


def test_the_vocabulary_is_as_large_as_the_captions_support():
    small = train_tokenizer(["one two"] * 3, vocab_size=10_000, length=4)
    assert 4 < small.vocab_size < 20


def test_a_saved_model_is_loaded_again(tokenizer, tmp_path):
    path = tmp_path / "work" / "tokenizer.model"
    tokenizer.save(path)
    loaded = load_tokenizer(path, length=5)
    np.testing.assert_array_equal(loaded.encode(CAPTIONS), tokenizer.encode(CAPTIONS)[:, :5])


def test_a_vocabulary_too_small_for_the_characters_is_refused():
    with pytest.raises(DataError, match="cannot train a tokenizer of 5 pieces from 144 captions"):
        train_tokenizer(CAPTIONS, vocab_size=5, length=8)


@pytest.mark.parametrize("captions", [[], ["", "  "]])
def test_no_captions_train_nothing(captions):
    with pytest.raises(DataError, match="no captions"):
        train_tokenizer(captions, vocab_size=100, length=24)


def test_a_model_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.model"):
        load_tokenizer(tmp_path / "none.model", length=8)


@pytest.mark.parametrize("content", [b"", b"text", bytes(1000), b"\x80\x04pickle."])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.model is not a SentencePiece model"):
        load_tokenizer(path, length=8)


def test_a_cut_model_is_refused(tokenizer, tmp_path):
    path = tmp_path / "bad.model"
    path.write_bytes(tokenizer.model[:-5])
    with pytest.raises(DataError, match=r"bad\.model is not a SentencePiece model"):
        load_tokenizer(path, length=8)


def test_a_model_without_padding_is_refused():
    model = io.BytesIO()
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=100, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(DataError, match="no pad piece with id 0"):
        Tokenizer(model.getvalue(), length=8)


def test_a_length_of_zero_is_refused(tokenizer):
    with pytest.raises(ValueError, match="length 0"):
        Tokenizer(tokenizer.model, length=0)
