"""Sorting by packed fields is sorting by the fields, wherever a word ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels.packed_sort import Field, descending, sort_fields


def lexicographic(arrays):
    order = np.lexsort([np.asarray(array) for array in reversed(arrays)])
    return [np.asarray(array)[order] for array in arrays]


@given(st.lists(st.integers(0, 32), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_any_fields_of_any_bits(bits, length, seed):
    """One word, two that share a field, or as many as fields; numbers at both ends of their range among them."""
    rng = np.random.default_rng(seed)
    fields = []
    for n in bits:
        values = rng.integers(0, 1 << n, length, dtype=np.uint64).astype(np.uint32)
        values[rng.random(length) < 0.3] = (1 << n) - 1
        fields.append(Field(jnp.asarray(values), 1 << n))
    for mine, theirs in zip(sort_fields(fields), lexicographic([f.values for f in fields]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == jnp.uint32


@pytest.mark.parametrize(
    ("limits", "operands"),
    [((33, 1 << 32, 16384), 2), ((16385, 17409), 1), ((2, 1 << 32, 1 << 30), 3), ((1 << 31,), 1), ((65537, 69121), 2)],
)
def test_how_many_words_are_sorted(limits, operands):
    def run(*arrays):
        return sort_fields([Field(array, limit) for array, limit in zip(arrays, limits, strict=True)])

    eqns = jax.make_jaxpr(run)(*[jnp.zeros(8, jnp.uint32)] * len(limits)).eqns
    (sort,) = (eqn for eqn in eqns if eqn.primitive.name == "sort")
    assert len(sort.invars) == operands == sort.params["num_keys"]


def test_rows_are_sorted_one_by_one_and_keep_their_dtypes():
    rng = np.random.default_rng(0)
    expert, token = rng.integers(0, 5, (3, 20)).astype(np.int32), np.tile(rng.permutation(20).astype(np.int32), (3, 1))
    found = sort_fields([Field(jnp.asarray(expert), 5), Field(jnp.asarray(token), 20)])
    for row in range(3):
        for mine, theirs in zip(found, lexicographic([expert[row], token[row]]), strict=True):
            np.testing.assert_array_equal(mine[row], theirs)
            assert mine.dtype == jnp.int32


@given(st.lists(st.floats(width=32), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_numbers_descend_and_ties_keep_their_order(values):
    given = np.asarray(values, np.float32)
    _, order = sort_fields([descending(jnp.asarray(given)), Field(jnp.arange(len(given)), len(given))])
    with np.errstate(invalid="ignore"):
        # A denormal number is 0 to XLA's CPU back end.
        flushed = np.where(np.abs(given) < np.finfo(np.float32).tiny, np.float32(0), given)
    np.testing.assert_array_equal(order, np.argsort(-flushed, kind="stable"))
