"""Evaluators and the table of them. Their figures are in summary.json and in `limoe eval --json`."""

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
    """Fields of `EvaluationData` that must not be None; else nothing is measured."""
    measure: Callable[[Encoder, EvaluationData], Any]
    nothing: Any
    """The figures if nothing is measured: a value of the same NamedTuple."""
    text: Callable[[Any], str]
    """Formats the figures for a terminal, in one or more lines."""


_EVALUATORS: dict[str, Evaluator] = {}


def register(evaluator: Evaluator) -> None:
    """Add an evaluator to all evaluations of this program, including the one at the end of a run.

    Raises ValueError if its name or a figure's name is taken, or if a field that it needs does not exist.
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
    """Give all figures by name for an evaluation without data."""
    merged: dict[str, Any] = {}
    for evaluator in _EVALUATORS.values():
        merged |= evaluator.nothing._asdict()
    return merged | {"evaluation_bad_examples": 0}


def evaluate(encoder: Encoder, data: EvaluationData) -> dict[str, Any]:
    """Compute the figures of all evaluators by name. The names do not depend on the data."""
    figures = no_figures() | {"evaluation_bad_examples": data.num_bad}
    for evaluator in _EVALUATORS.values():
        if all(getattr(data, name) is not None for name in evaluator.needs):
            figures |= evaluator.measure(encoder, data)._asdict()
    return figures


def in_words(figures: dict[str, Any]) -> list[str]:
    """Format one or more lines for each evaluator that has measured something."""
    lines = []
    for evaluator in _EVALUATORS.values():
        found = type(evaluator.nothing)(**{name: figures[name] for name in evaluator.nothing._fields})
        if found != evaluator.nothing:
            lines += evaluator.text(found).splitlines()
    return lines
