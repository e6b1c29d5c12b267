"""Tables of embeddings: checked, and compared block by block.

Letters of this folder: N rows (images, pairs), P width of the embeddings, Q classes. Every figure is a share between 0
and 1, and the result of a function depends on its arguments only: equal scores count against the model, so that one
that gives every candidate the same score gets 0 and not a share that depends on the order of the candidates.
"""

from collections.abc import Iterator

import numpy as np

# Scores held at once; about 30 bytes each at the widest place, so 120 MB.
_SCORES_PER_BLOCK = 4_000_000


def blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Rows of a table of scores, as many at a time as the memory is meant for."""
    size = max(1, _SCORES_PER_BLOCK // num_columns)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def scores_of(query: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Dot products [queries, candidates] in float32."""
    # A product's last bits depend on the shapes of the blocks. Rounding float64 sums to float32 drops them, so equal
    # embeddings tie wherever they stand.
    return (query @ candidate.T).astype(np.float32)


def checked(name: str, value: np.ndarray) -> np.ndarray:
    """A table of embeddings in float64; ValueError where it is none, empty or not finite."""
    array = np.asarray(value)
    # NumPy knows bfloat16 as kind "V".
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiuV":
        raise ValueError(f"{name} must be a table [rows, width] of numbers that is not empty, not {_shape(array)}")
    array = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(f"row {bad[0]} of {name} ({len(bad)} of {len(array)} rows) is not finite; the model is broken")
    return array


def check_width(name: str, value: np.ndarray, other_name: str, other: np.ndarray) -> None:
    """Raise ValueError unless both tables are as wide."""
    if value.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} has width {value.shape[1]} and {other_name} width {other.shape[1]}; they must be equal"
        )


def checked_ids(name: str, value: np.ndarray, num_rows: int) -> np.ndarray:
    """Integers, one a row; ValueError where they are not."""
    array = np.asarray(value)
    if array.shape != (num_rows,) or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be {num_rows} integers, one a row, not {_shape(array)}")
    return array


def checked_labels(name: str, value: np.ndarray, num_rows: int, num_classes: int | None) -> np.ndarray:
    """Classes from 0, one a row; ValueError where they are not, or not below `num_classes`."""
    array = checked_ids(name, value, num_rows).astype(np.int64)
    if array.min() < 0 or (num_classes is not None and array.max() >= num_classes):
        limit = "" if num_classes is None else f" to {num_classes - 1}"
        raise ValueError(f"{name} must lie in 0{limit}, but ranges from {array.min()} to {array.max()}")
    return array


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
