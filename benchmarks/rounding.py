"""Bounds on the error of a right answer, row by row, from its dtype and the length of its sums.

Storing a value has a relative error of at most `u = 2^-8` in bfloat16 and 2^-24 in float32. A sum of L products is
float32 in both cases and adds an error of 2 eps sqrt(L) of the terms' size. The magnitude `m` of an entry is its own
size or the root mean square of its row, whichever is larger. If a row may cancel, the sizes of its terms count instead,
for the row or for each entry.
An error uniform in -u m .. u m has a root mean square of u m / sqrt(3); over all mantissas it is about half of u m. N
independent roundings in a chain have `sigma = sqrt(N) u m / 2`. One more rounding, that of a gate, may be common to a
whole row. With N = 16, so sigma = 2 u m, a right answer satisfies

- each entry: |error| <= u m + 4 sigma = 9 u m (in bfloat16 3.5%)
- each row: ||error|| <= u ||m|| + ||sigma|| + 4 max sigma, by the concentration of a norm of independent errors
- each row and the whole array: |<error, exact>| <= u ||exact||^2 + 4 ||sigma exact||. Independent errors cancel here,
  but a common factor does not. For K normally distributed entries the factor may be off by u (1 + 8 sqrt(3 / K)). In
  bfloat16 that is 0.73% for 256 entries (the fewest in a row of a small twin) and approaches 0.4%. So this finds a bias
  of 1%, even if bfloat16 rounds the factor to 1.0078.

A row to which nothing was sent must be exactly 0.
"""

import numpy as np

_UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
_SIGMA, _DEVIATIONS = 2.0, 4.0


def unit(dtype: str, length: int) -> float:
    """Compute the bound `u` of one rounding after a sum of `length` terms.

    >>> unit("bfloat16", 1) / 2.0**-8, unit("float32", 4) / 2.0**-23
    (1.00006103515625, 4.5)
    """
    return _UNIT[dtype] + 2 * 2.0**-23 * length**0.5


def compare(mine: np.ndarray, exact: np.ndarray, unit: float, added: np.ndarray | None = None) -> str | None:
    """Describe the first fault of an array, or return None. The last axis is a row.

    `added` has the root mean square of the terms that were added up, for each row (all axes but the last) or for each
    entry. The default is the root mean square of the row itself.

    >>> exact = np.array([[1.0, -2.0], [0.001, 0.001], [0.0, 0.0]])
    >>> compare(exact, exact, 1e-3)
    >>> compare(exact + [[0], [0.001], [0]], exact, 1e-3)
    'row 1 has an entry that is off by 0.001 where entries are 0.001 (allowed 9e-06)'
    """
    if mine.shape != exact.shape:
        return f"has shape {mine.shape}, not {exact.shape}"
    if exact.size == 0:
        return None
    mine, exact = mine.reshape(-1, exact.shape[-1]), exact.reshape(-1, exact.shape[-1])
    error = np.where(np.isfinite(mine), mine - exact, np.inf)
    of_entries = exact if added is None else added.reshape(len(exact), -1)
    typical = np.sqrt(np.square(of_entries).mean(axis=1))
    magnitude = np.maximum(np.maximum(np.abs(exact), np.abs(of_entries)), typical[:, None])
    empty = (exact == 0).all(axis=1)
    if (mine[empty & (typical == 0)] != 0).any():
        return "is not exactly 0 where nothing was sent"

    bound = unit * (1 + _SIGMA * _DEVIATIONS) * magnitude
    if (where := _first(np.abs(error) > bound)) is not None:
        row, column = np.unravel_index(where, error.shape)
        return (
            f"row {row} has an entry that is off by {error[row, column]:.2g} where entries are "
            f"{magnitude[row, column]:.2g} (allowed {bound[row, column]:.2g})"
        )
    size = np.linalg.norm(magnitude, axis=1)
    bound = unit * (size + _SIGMA * (size + _DEVIATIONS * magnitude.max(axis=1)))
    norm = np.linalg.norm(error, axis=1)
    if (row := _first(norm > bound)) is not None:
        return f"row {row} is off by {norm[row]:.2g} where its length is {size[row]:.2g} (allowed {bound[row]:.2g})"

    along = (error * exact).sum(axis=1)
    square = np.square(exact).sum(axis=1)
    spread = np.square(unit * _SIGMA * magnitude * exact).sum(axis=1)
    if (row := _first(np.abs(along) > unit * square + _DEVIATIONS * np.sqrt(spread))) is not None:
        return f"row {row} is too {_sense(along[row], square[row])}"
    if abs(along.sum()) > unit * square.sum() + _DEVIATIONS * np.sqrt(spread.sum()):
        return f"is as a whole too {_sense(along.sum(), square.sum())}"
    return None


def _first(wrong: np.ndarray) -> int | None:
    return int(wrong.argmax()) if wrong.any() else None


def _sense(along: float, square: float) -> str:
    return f"{'large' if along > 0 else 'small'} by {100 * abs(along) / square:.2g}%"
