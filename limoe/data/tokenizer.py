"""Captions to token ids with SentencePiece: lower case, fixed length, pad id 0."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from jaxtyping import Int32

from limoe.config.schema import PAD_ID
from limoe.data import files
from limoe.data.files import DataError

UNKNOWN_ID = 1


class Tokenizer:
    """A SentencePiece model that encodes every caption as `length` token ids.

    Use `train_tokenizer` or `load_tokenizer` to make one. `vocab_size` is the number of ids, pad included.
    """

    def __init__(self, model: bytes, *, length: int, name: str = "the tokenizer model") -> None:
        if length < 1:
            raise ValueError(f"length {length} must be at least 1 token")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise DataError(f"{name} is not a SentencePiece model ({error}); give a .model file") from error
        if self._processor.pad_id() != PAD_ID:
            raise DataError(f"{name} has no pad piece with id {PAD_ID}; train the model with pad_id={PAD_ID}")
        self.model = model
        self.length = length
        self.vocab_size: int = self._processor.vocab_size()

    def encode(self, captions: Sequence[str]) -> Int32[np.ndarray, "B N"]:
        """Encode captions in lower case as int32 [B, N], cut to `length` tokens or padded with `PAD_ID`.

        A caption without any token gets the unknown token, so that no row is all padding.
        """
        tokens = np.full((len(captions), self.length), PAD_ID, np.int32)
        for row, pieces in enumerate(
            self._processor.encode([_normalised(caption) for caption in captions], num_threads=1)
        ):
            kept = pieces[: self.length] or [self._processor.unk_id()]
            tokens[row, : len(kept)] = kept
        return tokens

    def num_cut(self, captions: Sequence[str]) -> int:
        """Count the captions with more than `length` tokens, which `encode` cuts."""
        encoded = self._processor.encode([_normalised(caption) for caption in captions], num_threads=1)
        return sum(len(pieces) > self.length for pieces in encoded)

    def piece(self, token: int) -> str:
        """Give the text of a token id. A piece from inside a word begins with a dash."""
        piece = self._processor.id_to_piece(token)
        return piece[1:] if piece.startswith("\u2581") else f"-{piece}"

    def save(self, path: files.Path) -> None:
        """Write the .model file atomically. Raises `StorageError` if it cannot be written."""
        files.write_bytes(path, self.model)


def load_tokenizer(path: files.Path, *, length: int) -> Tokenizer:
    """Load a .model file. Raises `DataError` if it is missing, is no SentencePiece model or has no pad id 0."""
    if not files.exists(path):
        raise DataError(f"there is no tokenizer model {path}; give a SentencePiece .model file")
    return Tokenizer(files.read_bytes(path), length=length, name=str(path))


def train_tokenizer(captions: Iterable[str], *, vocab_size: int, length: int) -> Tokenizer:
    """Train a byte-pair model. The same captions in the same order give the same bytes.

    The model has `vocab_size` pieces, or fewer if the captions do not support that many. Raises `DataError` if there
    are no captions, or if `vocab_size` is too small for their characters.

    >>> tokenizer = train_tokenizer(["a red ring", "a blue ring", "two red rings"] * 10, vocab_size=40, length=12)
    >>> tokens = tokenizer.encode(["A RED ring", "a red ring"])
    >>> tokens.shape, bool((tokens[0] == tokens[1]).all()), tokens[0, -1].item() == PAD_ID
    ((2, 12), True, True)
    """
    sentences = [sentence for sentence in map(_normalised, captions) if sentence]
    if not sentences:
        raise DataError("there are no captions to train a tokenizer from; check the data or give a .model file")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
            sentence_iterator=iter(sentences),
            model_writer=model,
            # Unigram stops at 144 pieces if captions have few different words (101 in the embedded world). It then
            # splits words and needs 16.4 tokens for a caption; byte pairs need 9.1.
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=PAD_ID,
            unk_id=UNKNOWN_ID,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # more would change the order of sums, and so the bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"cannot train a tokenizer of {vocab_size} pieces from {len(sentences)} captions: {error}"
        ) from error
    return Tokenizer(model.getvalue(), length=length)


def _normalised(caption: str) -> str:
    # JSON may hold half of a surrogate pair, which is no text for SentencePiece.
    return " ".join(caption.encode("utf-8", "replace").decode().lower().split())
