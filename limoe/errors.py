"""What a person can mend, and the hint for a slip of the pen."""

import difflib
from collections.abc import Iterable


class LimoeError(Exception):
    """The command line prints the message of such an error; any other is a bug and keeps its traceback."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that looks most like this one, if one does.

    >>> nearest("trian", ["train", "eval"]), nearest("zzz", ["train", "eval"])
    ('train', None)
    """
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)
