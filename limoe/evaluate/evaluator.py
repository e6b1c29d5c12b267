"""What an evaluator is, and the table of them: their figures land in summary.json and in `limoe eval --json`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limoe.evaluate.data import EvaluationData
from limoe.evaluate.encode import Encoder


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """One kind of evaluation: a function from an encoder and data to a NamedTuple of figures that JSON can hold."""

    name: str
    needs: tuple[str, ...]
    """Fields of `EvaluationData` that must not be None; without one of them nothing is measured."""
    measure: Callable[[Encoder, EvaluationData], Any]
    nothing: Any
    """The figures where nothing is measured: a value of the same NamedTuple."""
    text: Callable[[Any], str]
    """The figures in words for a terminal, in one or more lines."""


_EVALUATORS: dict[str, Evaluator] = {}


def register(evaluator: Evaluator) -> None:
    """Add an evaluator to all evaluations of this program, also of a run at its end.

    Raises ValueError for a name, a field of data or a figure that is taken or not there.
    """
    if evaluator.name in _EVALUATORS:
        raise ValueError(f"there is an evaluator {evaluator.name!r} already; give this one another name")
    strange = sorted(set(evaluator.needs) - set(EvaluationData._fields))
    if strange:
        raise ValueError(
            f"evaluator {evaluator.name!r} needs {', '.join(strange)}; data are {', '.join(EvaluationData._fields)}"
        )
    taken = sorted(set(no_figures()) & set(evaluator.nothing._fields))
    if taken:
        raise ValueError(f"evaluator {evaluator.name!r}: other figures are called {', '.join(taken)} already")
    _EVALUATORS[evaluator.name] = evaluator


def no_figures() -> dict[str, Any]:
    """All figures, by name, of an evaluation without data."""
    merged: dict[str, Any] = {}
    for evaluator in _EVALUATORS.values():
        merged |= evaluator.nothing._asdict()
    return merged | {"evaluation_bad_examples": 0}


def evaluate(encoder: Encoder, data: EvaluationData) -> dict[str, Any]:
    """The figures of all evaluators, by name: the same names whatever data there are."""
    figures = no_figures() | {"evaluation_bad_examples": data.num_bad}
    for evaluator in _EVALUATORS.values():
        if all(getattr(data, name) is not None for name in evaluator.needs):
            figures |= evaluator.measure(encoder, data)._asdict()
    return figures


def in_words(figures: dict[str, Any]) -> list[str]:
    """A line or more for each evaluator that has measured something."""
    lines = []
    for evaluator in _EVALUATORS.values():
        found = type(evaluator.nothing)(**{name: figures[name] for name in evaluator.nothing._fields})
        if found != evaluator.nothing:
            lines += evaluator.text(found).splitlines()
    return lines
