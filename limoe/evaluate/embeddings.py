"""Tables of embeddings: checks, and comparisons block by block.

Letters in this folder: N rows (images, pairs), P width of the embeddings, Q classes. Every figure is a share from 0 to
1 and depends only on the arguments. Equal scores count against the model: a model that gives every candidate the same
score gets 0, whatever the order of the candidates.
"""

from collections.abc import Iterator

import numpy as np

# Scores in memory at once. Each needs at most about 30 bytes, so all need 120 MB.
_SCORES_PER_BLOCK = 4_000_000


def blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Split the rows of a table of scores into blocks that fit the memory limit."""
    size = max(1, _SCORES_PER_BLOCK // num_columns)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def scores_of(query: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Compute dot products [queries, candidates], rounded to float32."""
    # The last bits of a product depend on the shapes of the blocks. Rounding float64 sums to float32 drops them, so
    # equal embeddings tie in every block.
    return (query @ candidate.T).astype(np.float32)


def checked(name: str, value: np.ndarray) -> np.ndarray:
    """Convert a table of embeddings to float64. Raises ValueError if it is not a table, is empty or is not finite."""
    array = np.asarray(value)
    # In NumPy, bfloat16 has kind "V".
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiuV":
        raise ValueError(f"{name} must be a table [rows, width] of numbers that is not empty, not {_shape(array)}")
    array = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(f"row {bad[0]} of {name} ({len(bad)} of {len(array)} rows) is not finite; the model is broken")
    return array


def check_width(name: str, value: np.ndarray, other_name: str, other: np.ndarray) -> None:
    """Raise ValueError unless both tables have the same width."""
    if value.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} has width {value.shape[1]} and {other_name} width {other.shape[1]}; they must be equal"
        )


def checked_ids(name: str, value: np.ndarray, num_rows: int) -> np.ndarray:
    """Check integers, one for each row. Raises ValueError if they are not."""
    array = np.asarray(value)
    if array.shape != (num_rows,) or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be {num_rows} integers, one for each row, not {_shape(array)}")
    return array


def checked_labels(name: str, value: np.ndarray, num_rows: int, num_classes: int | None) -> np.ndarray:
    """Check classes, one for each row. Raises ValueError if one is not in 0 to `num_classes` - 1."""
    array = checked_ids(name, value, num_rows).astype(np.int64)
    if array.min() < 0 or (num_classes is not None and array.max() >= num_classes):
        limit = "" if num_classes is None else f" to {num_classes - 1}"
        raise ValueError(f"{name} must lie in 0{limit}, but ranges from {array.min()} to {array.max()}")
    return array


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
