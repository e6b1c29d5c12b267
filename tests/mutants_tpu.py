"""How the TPU kernels are broken one way at a time, and the tests that must notice it.

Each mutant names the smallest set of tests that should notice it. Block sizes and `vmem_limit_bytes` are left out: no
interpreter has a limit, and the tests with the real compiler hold them.
"""

from mutate import Mutant, tests

MLP = tests("test_tpu_mlp.py::test_values_and_gradients[several chunks, several items, float32/float32]")
MLP_PIECES = tests("test_tpu_mlp.py::test_values_and_gradients[packed, one chunk, bfloat16/float32]")
MLP_RUNS = tests("test_tpu_mlp.py::test_values_and_gradients[several runs, bfloat16/bfloat16]")
MLP_POISON = tests(
    "test_tpu_mlp.py::test_what_is_not_an_experts_own_never_reaches_it[packed, one piece an item-size1-False-nan]"
)
KEPT = tests("test_tpu_mlp.py::test_a_kept_hidden_layer[several chunks, several items, float32/float32]")
KEPT_POISON = tests(
    "test_tpu_mlp.py::test_what_is_not_an_experts_own_never_reaches_it[packed, one piece an item-size2-True-nan]"
)
KEPT_RACES = tests("test_tpu_races.py::test_no_races_with_a_kept_hidden_layer[block-1-on_wait]")
MLP_EMPTY = tests("test_tpu_mlp.py::test_every_pattern_of_empty_experts[one piece]")
MLP_RACES = tests("test_tpu_races.py::test_no_races_and_no_uninitialised_memory[packed-1-on_wait]")
GLU = tests("test_tpu_glu.py::test_values_and_gradients[several chunks, several items-float32-float32-silu]")
MATMUL = tests(
    "test_tpu_matmul.py::test_values_and_gradients[several chunks, several items-bfloat16-float32-none]",
)
MATMUL_BIAS = tests("test_tpu_matmul.py::test_values_and_gradients[odd widths-bfloat16-float32-pointwise]")
MATMUL_GATED = tests(
    "test_tpu_matmul.py::test_values_and_gradients[several chunks, several items-float32-float32-gated]"
)
MATMUL_POISON = tests(
    "test_tpu_matmul.py::test_what_is_not_an_experts_own_never_reaches_it[none-packed, one piece an item-size1-nan]"
)
MATMUL_RACES = tests("test_tpu_races.py::test_a_grouped_matmul_has_no_races[block-1-on_wait-0-none]")
PACKED_RACES = tests("test_tpu_races.py::test_a_grouped_matmul_has_no_races[packed, one chunk-1-on_wait-4-none]")
TWO_CORES = tests("test_tpu_races.py::test_a_grouped_matmul_has_no_races[packed-2-on_wait-3-none]")
MEMORIES = "test_with_simulated_memories_results_are_the_same_and_no_core_disturbs_the_other"
COLUMNS_BEHIND = tests(f"test_tpu_permute.py::{MEMORIES}[2-on_wait-640-3]")
COLUMNS = tests(f"test_tpu_permute.py::{MEMORIES}[2-eager-512-2]")

MUTANTS = {
    # Masks.
    "mask one row too long": Mutant(MATMUL_POISON, "return row < schedule.size[at]", "return row <= schedule.size[at]"),
    "mask one row too short": Mutant(MATMUL, "return row < schedule.size[at]", "return row < schedule.size[at] - 1"),
    "rows between runs not masked": Mutant(MLP_RUNS, "(row < first + schedule.run_size[run])", "(row >= first)"),
    "items of several runs masked as the first": Mutant(
        MLP_RUNS,
        "row = row + schedule.offset[at]",
        "row = row + 0 * schedule.offset[at]",
    ),
    "mask by arithmetic": Mutant(
        MATMUL_POISON,
        "jnp.where(used, block[...], jnp.zeros((), block.dtype))",
        "block[...] - jnp.where(used, jnp.zeros((), block.dtype), block[...])",
    ),
    "dy not masked": Mutant(MATMUL_POISON, "        self._select(at, dy)\n", ""),
    "a kept hidden layer not masked": Mutant(
        KEPT_POISON,
        "return jnp.where(used, kept[pl.ds(offset, size)], jnp.zeros((), scratch.x.dtype))",
        "return kept[pl.ds(offset, size)]",
    ),
    "a kept hidden layer masked as its first piece": Mutant(
        KEPT, "(size, self.tiles.chunk), offset)", "(size, self.tiles.chunk))"
    ),
    "x of the expert MLP not masked": Mutant(
        MLP_POISON, "scratch.x[slot] = jnp.where(used, scratch.x[slot], zero)", "pass"
    ),
    # Offsets and sizes.
    "pieces start one short": Mutant(
        tests("test_tpu_matmul.py::test_what_is_left_takes_two_pieces"),
        "offset = offset + taken * size\n",
        "offset = offset + taken * (size - 16)\n",
    ),
    "last piece left out": Mutant(MATMUL, "count - whole * largest + (PIECE - 1)", "count - whole * largest"),
    "last rows not copied": Mutant(MATMUL, "self.count + (ROW_ALIGNMENT - 1)", "self.count"),
    "copies start at the first row of VMEM": Mutant(
        MATMUL,
        "self.vmem.at[pl.ds(_multiple(offset, min(PIECE, size)), size)]",
        "self.vmem.at[pl.ds(0, size)]",
    ),
    "columns of the first chunk": Mutant(
        MATMUL,
        "pl.ds(pl.multiple_of(chunk * self.tiles.chunk, self.tiles.chunk)",
        "pl.ds(pl.multiple_of(0 * chunk, self.tiles.chunk)",
    ),
    "gradients of the wrong chunk": Mutant(
        MATMUL,
        "pl.multiple_of(chunk * self.chunk, self.chunk)",
        "pl.multiple_of(0 * chunk, self.chunk)",
    ),
    "weights of the first expert": Mutant(
        MLP,
        "return schedule.fetched[at], self",
        "return 0 * schedule.fetched[at], self",
    ),
    # Accumulators.
    "dx not reset": Mutant(
        MATMUL, "scratch.dx[...] = jnp.zeros(scratch.dx.shape, jnp.float32)", "pass", beside="self._no_bias"
    ),
    "output not reset to the bias": Mutant(
        MLP, "@pl.when(busy & (step.chunk == 0))", "@pl.when(busy & (step.number == 0))"
    ),
    "weight sums not reset": Mutant(
        MATMUL, "sums[...] = jnp.zeros(sums.shape, jnp.float32)", "pass", beside="weight.sums(slot)"
    ),
    "sums of an expert's last item lost": Mutant(
        MATMUL,
        "starts = self.scalars.schedule.part[at] == STARTS",
        "starts = self.scalars.schedule.part[at] != 0",
    ),
    "an expert without rows keeps what was there": Mutant(MLP_EMPTY, "            self.zero(slot)\n", ""),
    "bias sums not reset": Mutant(MATMUL_BIAS, "        self._no_bias()\n", ""),
    "bias sums of an expert without rows kept": Mutant(
        tests("test_tpu_matmul.py::test_every_pattern_of_empty_experts[one piece-pointwise]"),
        "self._work(step, dy, out_slot, gradients), self._no_bias)",
        "self._work(step, dy, out_slot, gradients))",
    ),
    "db1 not reset": Mutant(
        MLP_PIECES,
        "            outputs.db1[...] = jnp.zeros(outputs.db1.shape, jnp.float32)\n\n            def add",
        "            def add",
    ),
    # Waits.
    "rows not waited for": Mutant(MATMUL_RACES, "        rows(at, slot).fetched()\n", ""),
    "chunks not waited for": Mutant(MATMUL_RACES, "        self.of(step.core, step.number).fetched()\n", ""),
    "results not waited for": Mutant(
        MATMUL_RACES,
        "        pl.when(step.number >= 2)(lambda: self.of(step.core, step.number - 2).written())\n",
        "",
    ),
    "results not waited for at the end": Mutant(
        MATMUL_RACES,
        "                self.of(step.core, step.number - last).written()\n",
        "                pass\n",
    ),
    "a kept hidden layer not waited for": Mutant(KEPT_RACES, "        self.of(step.core, step.number).fetched()\n", ""),
    "a kept hidden layer overwritten on its way": Mutant(
        KEPT_RACES,
        "        pl.when(step.number >= 2)(lambda: self.of(step.core, step.number - 2).written())\n",
        "",
    ),
    "rows overwrite results on their way": Mutant(
        MLP_RACES,
        "pl.when(self.item > 0)(lambda: results(self.at - 1, other).written())",
        "pass",
    ),
    "gradients overwritten on their way": Mutant(
        PACKED_RACES,
        "        pl.when(waits)(lambda: self.wait(step.core, step.number - self.num_slots))\n",
        "",
    ),
    "sums read back not waited for": Mutant(
        TWO_CORES,
        "self._each(at, chunk, slot, lambda copy: copy.wait(), back=True)",
        "pass",
    ),
    # Slots.
    "the next rows overwrite these": Mutant(
        MATMUL_RACES, "lambda: rows(at + 1, 1 - slot).fetch()", "lambda: rows(at + 1, slot).fetch()"
    ),
    "one place for two items": Mutant(MLP_RACES, "other = 1 - self.slot", "other = self.slot"),
    "two slots for sums that are read back at once": Mutant(
        PACKED_RACES, "return 2 if once or grid.chunks > 1 else 1", "return 2"
    ),
    # What is computed.
    "gradient through the gate left out": Mutant(
        MATMUL_GATED, "[dresult * (gated[0] * slope), dresult * activated]", "[dresult * slope, dresult * activated]"
    ),
    "dx of the first matrix alone": Mutant(MATMUL_GATED, "return sum(others, start=first)", "return first"),
    "gradient of up without the activation": Mutant(
        GLU, "[dresult * (gated[0] * slope), dresult * activated]", "[dresult * (gated[0] * slope), dresult]"
    ),
    "gradient of down from a hidden layer without up": Mutant(
        GLU, "return Back(activated * gated[0],", "return Back(activated,"
    ),
    "up not let through": Mutant(GLU, "(activated * gated[0] if gated else activated)", "activated"),
    "the gate taken for up": Mutant(GLU, "(w1,) if up is None else (w1, up)", "(w1,) if up is None else (w1, w1)"),
    "gradients of gate and up exchanged": Mutant(
        GLU, "expert_width] for dweight in dfirst)", "expert_width] for dweight in dfirst[::-1])"
    ),
    "slope without the factor 3 of its cubic": Mutant(
        tests("test_tpu_matmul.py::test_every_activation[pointwise-gelu_tanh]"),
        "(_SCALE + 3 * _SCALE * _CUBIC * square)",
        "(_SCALE + _SCALE * _CUBIC * square)",
    ),
    "sums of items given to their neighbours": Mutant(
        MLP,
        "mine = (schedule.expert[None] == experts[:, None])",
        "mine = (schedule.expert[None] == experts[:, None] + 1)",
    ),
    "cotangents of tokens passed on added after rounding": Mutant(
        tests("test_tpu_route.py::test_the_cotangent_of_tokens_passed_on_is_added_before_rounding[exact tiles-tpu]"),
        "product += inputs.passed[0].astype(jnp.float32)",
        "product = product.astype(dtokens.dtype).astype(jnp.float32) + inputs.passed[0].astype(jnp.float32)",
    ),
    "shorter pieces for one row too many, from rows": Mutant(
        tests("test_tpu_mlp.py::test_as_many_shorter_pieces_hold_all_rows"),
        "(count <= number * short)",
        "(count <= number * short + 1)",
    ),
    "an item of the last expert": Mutant(MATMUL, "end[None, None] <= item", "end[None, None] < item"),
    "cores share items": Mutant(TWO_CORES, "return core * self.items + item", "return core + item"),
    "no piece for an expert that fills it": Mutant(
        tests("test_tpu_mlp.py::test_the_shortest_piece_that_fills_the_mxu_holds_all_rows"),
        "(count > shorter) & (count <= size)",
        "(count > shorter) & (count < size)",
        beside="if straight(self.static.layout, rows)",
    ),
    "the second core gathers the tiles of the first": Mutant(
        COLUMNS_BEHIND,
        "first = core * self.share",
        "first = 0 * core",
    ),
    "the second core gathers the columns of the first": Mutant(
        COLUMNS, "core * self.blocks + block", "0 * core + block"
    ),
    "products of one block of columns": Mutant(
        COLUMNS, "jnp.sum(found.out[:, :, :count], axis=0)", "found.out[0, :, :count]"
    ),
    "products of columns that do not exist": Mutant(
        COLUMNS_BEHIND, "jnp.where(own.start < exist, product, jnp.float32(0))", "product"
    ),
    "places of the first tile for all": Mutant(
        COLUMNS, "return self.tile_of(core, step), 0, 0", "return 0 * step, 0, 0"
    ),
}
