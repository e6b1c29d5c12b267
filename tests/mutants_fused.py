"""How dispatch, experts and combine in one kernel are broken, and the tests that must notice it."""

from mutate import Mutant, tests

FUSED_PIECES = tests("test_tpu_fused.py::test_values_and_gradients[pieces and chunks-float32-float32]")
FUSED_GROUPS = tests("test_tpu_fused.py::test_values_and_gradients[groups-bfloat16-float32]")
FUSED_RACES = tests("test_tpu_fused.py::test_no_races_and_no_uninitialised_memory")
FUSED_POISON = tests("test_tpu_fused.py::test_what_is_not_finite_stays_where_it_belongs[inf]")
FUSED_PARTS = tests("test_tpu_fused.py::test_the_backward_pass_in_its_parts_gives_the_same_bits[groups]")

MUTANTS = {
    "a token without a row keeps what was in its place": Mutant(
        FUSED_GROUPS, "words = jnp.where(factor != 0, words, 0)", "pass"
    ),
    "results leave without gates": Mutant(
        FUSED_GROUPS, "= (value * factor).astype(outputs.out.dtype)", "= value.astype(outputs.out.dtype)"
    ),
    "a gate that is not finite is taken as it is": Mutant(
        FUSED_POISON, "jnp.where(jnp.isfinite(gate), factor, jnp.float32(jnp.nan))", "factor"
    ),
    "gates of the first block": Mutant(
        FUSED_PIECES,
        "column(inputs.factor, block * lanes + number, size)",
        "column(inputs.factor, number, size)",
    ),
    "results of unused rows go to the first token": Mutant(
        FUSED_GROUPS,
        "place = jnp.where(plan.source < layout.num_tokens, plan.source, spare)",
        "place = (plan.source % layout.num_tokens)",
    ),
    "rows of the first expert not picked": Mutant(FUSED_GROUPS, "pl.when(number == -1)", "pl.when(number == -2)"),
    "results of the last expert not put": Mutant(FUSED_GROUPS, "pl.when(number == steps)", "pl.when(number == -1)"),
    "rows that had no piece beside them not moved": Mutant(
        FUSED_PIECES, "moved = chunks * pieces * tiles.part", "moved = 2**20"
    ),
    "every piece moves the first rows": Mutant(
        FUSED_PIECES, "(chunk * pieces + step) * tiles.part", "(chunk * 0 + step) * tiles.part"
    ),
    "last piece of an expert left out": Mutant(FUSED_PIECES, "sizes[item] + (piece - 1)", "sizes[item]"),
    "shorter pieces for one row too many": Mutant(
        tests("test_tpu_fused.py::test_shorter_pieces_that_fill_the_mxu_hold_all_rows"),
        "fit = sizes[item] <= pieces * short",
        "fit = sizes[item] <= pieces * short + 1",
    ),
    "sums of the last expert not reset": Mutant(
        FUSED_PIECES,
        "scratch.total[...] = jnp.broadcast_to(self.inputs.b2[0], scratch.total.shape)",
        "pass",
    ),
    "gradient of a gate without influence": Mutant(
        FUSED_POISON, "jnp.where(held, found.gate, jnp.float32(0))", "found.gate"
    ),
    "rows kept for another expert": Mutant(
        FUSED_PARTS,
        "BlockSpec(held, steps.whole)",
        "BlockSpec(held, lambda step, _: (0 * step, 0, 0))",
    ),
    "rows kept from behind those of an expert": Mutant(
        FUSED_PARTS,
        "rows[:, : layout.rows_per_expert]",
        "rows[:, -layout.rows_per_expert :]",
    ),
    "rows not kept": Mutant(
        tests("test_tpu_fused.py::test_a_backward_pass_in_parts_gets_the_rows_if_they_fit[True]"),
        "keep=True, keep_rows=keep_rows)",
        "keep=True)",
    ),
    "cotangents without gates, backward in parts": Mutant(
        FUSED_PARTS, "(gate * dout.astype(jnp.float32)).astype(dout.dtype)", "dout"
    ),
    "weights of the expert of the chunk's number": Mutant(
        FUSED_PIECES,
        "in (schedule.fetched[:, None], fetched, item, chunk)",
        "in (fetched, fetched, item, chunk)",
    ),
    # The same, backward.
    "gradients of unused rows not masked": Mutant(
        FUSED_RACES, "words = jnp.where(used, source[own, :], 0)", "words = source[own, :]"
    ),
    "gradient of a token without a row left as it was": Mutant(
        FUSED_GROUPS,
        "words = jnp.where(has_row, scratch.data",
        "words = jnp.where(True, scratch.data",
    ),
    "cotangents come without gates": Mutant(FUSED_GROUPS, "(value * factor).astype(dtype)", "value.astype(dtype)"),
    "gates' gradients of weighed cotangents": Mutant(FUSED_PIECES, "product += value *", "product += value * factor *"),
    "rows that had no stretch beside them not moved": Mutant(
        FUSED_PIECES,
        "moved = chunks * stretches * tiles.part",
        "moved = 2**20",
    ),
    "every stretch moves the first rows": Mutant(FUSED_PIECES, "moves(first + n)", "moves(0 * first + n)"),
    "an expert without rows leaves gradients of another": Mutant(
        FUSED_GROUPS, "pl.when(size == 0)(lambda: self._zero(chunk))", "pass"
    ),
    "sums of gradients not reset": Mutant(
        FUSED_PIECES,
        "total[...] = jnp.where(offset == 0, 0.0, total[...]) + part",
        "total[...] += part",
    ),
    "shorter pieces of an expert left out": Mutant(
        FUSED_PIECES,
        "over_pieces(repeats, bits, rows, add)",
        "over_pieces(repeats, 0, rows, add)",
        beside="if not there",
    ),
}
