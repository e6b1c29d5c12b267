"""Errors that a user can fix, and hints for misspelled words."""

import difflib
from collections.abc import Iterable


class LimoeError(Exception):
    """An error that the user can fix. The command line prints only its message; other errors keep their traceback."""


class InputError(LimoeError, ValueError):
    """An input that a trained model cannot take. The message says which one, why, and what to give."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Find the known word that looks most like this one; None if none is close.

    >>> nearest("trian", ["train", "eval"]), nearest("zzz", ["train", "eval"])
    ('train', None)
    """
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)
