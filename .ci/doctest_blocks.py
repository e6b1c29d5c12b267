"""For the site: examples in docstrings become blocks of Python; Markdown would take `>>>` for quotations."""

import re
from typing import Any

import griffe

# A doctest runs from its first prompt to the next empty line, after prompts and their output.
_EXAMPLE = re.compile(r"^(>>> .*(?:\n(?!\s*$).*)*)", re.MULTILINE)


class DoctestBlocks(griffe.Extension):
    """Puts fences around the doctests of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\1\n```", obj.docstring.value)
