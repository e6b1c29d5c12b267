"""Break the GPU kernels one way at a time and see the tests fail: `python tests/mutate_gpu.py [NAME...]`.

What the interpreters cannot see is left out: they run wgmma at once, so a missing `wgmma_wait` changes nothing there
(JAX 0.10.2 and 0.12), and neither does a missing `commit_smem` (0.10.2) or
`wait_smem_to_gmem`.
"""

import sys

from mutate import Mutant, Mutation, main

BEFORE = """
import sys
sys.path.insert(0, "tests")
import conftest
conftest.compile_fast()
import gpu_cases as gpu
"""
MATMUL = BEFORE + 'gpu.check_matmul("packed", "bfloat16", "bfloat16", sizes=[(127, 17, 129, 70)])'
GATED = BEFORE + 'gpu.check_matmul("odd packed", "bfloat16", "float32", "gated", "silu", sizes=[(23, 24, 1)])'
POINTWISE = (
    BEFORE + 'gpu.check_matmul("odd packed", "bfloat16", "float32", "pointwise", "gelu_erf", sizes=[(23, 24, 1)])'
)
MLP = BEFORE + 'gpu.check_mlp("odd packed", "bfloat16", "bfloat16", sizes=[(23, 24, 1)])'
POISON = BEFORE + "import test_gpu_matmul; import numpy; test_gpu_matmul.check_poison(numpy.nan)"
GATHER = BEFORE + 'import test_gpu_permute; test_gpu_permute.check("groups", "bfloat16", "zipf")'
GATHER_ONE = BEFORE + 'import test_gpu_permute; test_gpu_permute.check("one row", "bfloat16")'
GATHER_PIECES = BEFORE + 'import test_gpu_permute; test_gpu_permute.check("two choices", "bfloat16")'
GATHER_POISON = BEFORE + "import test_gpu_permute; import numpy; test_gpu_permute.check_poison(numpy.inf)"
ROUTE = BEFORE + 'import test_gpu_route; test_gpu_route.check_case("one more than a tile")'
ROUTE_DEEP = BEFORE + 'import test_gpu_route; test_gpu_route.check_case("all choices")'
ROUTE_TIES = BEFORE + (
    "import test_gpu_route; test_gpu_route.test_near_ties_and_zeros_of_both_signs_are_decided_as_in_float32()"
)
ROUTE_POISON = BEFORE + "import test_gpu_route; import numpy; test_gpu_route.check_poison(numpy.nan)"

MUTATIONS = {
    "consumers do not wait for copies": Mutant(
        MATMUL,
        Mutation("gpu/common/launch.py", "plgpu.barrier_wait(self.full.at[slot])", "pass"),
    ),
    "producer does not wait for consumers": Mutant(
        MATMUL,
        Mutation(
            "gpu/common/launch.py",
            "            plgpu.barrier_wait(self.empty.at[slot])\n\n        return",
            "            pass\n\n        return",
        ),
    ),
    "stage released too early": Mutant(
        MATMUL,
        Mutation("gpu/sm90/row_matmul.py", "ring.release(filled + k - 1)", "ring.release(filled + k)"),
    ),
    "last stage not released": Mutant(
        MATMUL, Mutation("gpu/sm90/row_matmul.py", "ring.release(filled + slices - 1)", "pass")
    ),
    "no barrier after masking": Mutant(
        MATMUL,
        Mutation(
            "gpu/sm90/weight_gradient.py",
            "plgpu.barrier_arrive(clean)\n                plgpu.barrier_wait(clean)",
            "pass",
        ),
    ),
    "mask one row too long": Mutant(
        MATMUL, Mutation("gpu/sm90/weight_gradient.py", "jnp.where(row < size", "jnp.where(row <= size")
    ),
    "mask one row too short": Mutant(
        MATMUL,
        Mutation("gpu/sm90/weight_gradient.py", "jnp.where(row < size", "jnp.where(row < size - 1"),
    ),
    "no mask": Mutant(MATMUL, Mutation("gpu/sm90/weight_gradient.py", "@pl.when(size < DEPTH)", "@pl.when(size < 0)")),
    "mask by multiplication": Mutant(
        POISON,
        Mutation(
            "gpu/sm90/weight_gradient.py",
            "jnp.where(row < size, value, jnp.zeros_like(value))",
            "value * (row < size).astype(value.dtype)",
        ),
    ),
    "ragged ends stored whole": Mutant(
        MATMUL,
        Mutation(
            "gpu/sm90/row_matmul.py",
            "store_rows(out_s.at[wg, n % 2], out_g[i], row, used,",
            "store_rows(out_s.at[wg, n % 2], out_g[i], row, used | 64,",
        ),
    ),
    "second half of a tile skipped": Mutant(
        MATMUL,
        Mutation("gpu/sm90/row_matmul.py", "lax.cond(size > 0", "lax.cond((size > 0) & (wg == 0)"),
    ),
    "tiles of the wrong expert": Mutant(
        MATMUL,
        Mutation(
            "gpu/common/schedule.py",
            "runs.expert[run], runs.first[run]",
            "jnp.roll(runs.expert[run], 1), runs.first[run]",
        ),
    ),
    "bias not waited for": Mutant(
        MLP,
        Mutation("gpu/sm90/row_matmul.py", 'plgpu.barrier_wait(scratch["bias_full"].at[wg])', "pass"),
    ),
    "the gate stands where what it lets pass does": Mutant(
        GATED, Mutation("gpu/sm90/row_matmul.py", "yield 0, own + CHUNK, up", "yield 0, own + CHUNK, rounded")
    ),
    "products of a gate and the gate": Mutant(
        GATED, Mutation("gpu/sm90/row_matmul.py", "up = before(chunk + 1)", "up = before(chunk)")
    ),
    "products of the next columns": Mutant(
        GATED, Mutation("gpu/sm90/row_matmul.py", "lax.div(own, jnp.int32(2))", "lax.rem(own + CHUNK, jnp.int32(256))")
    ),
    "a gate's gradient without its slope": Mutant(
        GATED, Mutation("gpu/sm90/matmul.py", "up.astype(jnp.float32) * slope", "up.astype(jnp.float32)")
    ),
    "gradients of a pair the wrong way round": Mutant(
        GATED, Mutation("gpu/sm90/matmul.py", "dweight, dup = _apart(dmatrix)", "dup, dweight = _apart(dmatrix)")
    ),
    "a matmul's gradient past its activation": Mutant(
        POINTWISE, Mutation("gpu/sm90/matmul.py", "dout if hidden is None else", "dout if weights.up is None else")
    ),
    "a bias that is not added": Mutant(
        POINTWISE, Mutation("gpu/sm90/matmul.py", "bias=float32_of(weights.bias)", "bias=None")
    ),
    "hidden not waited for": Mutant(
        MLP,
        Mutation("gpu/sm90/row_matmul.py", 'plgpu.barrier_wait(scratch["hidden_full"].at[2 * wg + chunk])', "pass"),
    ),
    "slope without its second term": Mutant(
        MLP, Mutation("gpu/common/activation.py", "s + x * s * (1.0 - s)", "s + 0 * x * s * (1.0 - s)")
    ),
    "indices past the end are fetched": Mutant(
        GATHER,
        Mutation(
            "gpu/gather.py",
            "at = jnp.minimum(index_g[own, consumer, row + n], length - 1)",
            "at = index_g[own, consumer, row + n]",
        ),
    ),
    "rows of tiles past the end are fetched": Mutant(
        GATHER_ONE,
        Mutation(
            "gpu/gather.py",
            "jnp.minimum(tile * TILE_ROWS + first + n, count - 1)",
            "tile * TILE_ROWS + first + n",
        ),
    ),
    "the row behind the last is added": Mutant(
        GATHER, Mutation("gpu/gather.py", "[slot, wg] < length", "[slot, wg] <= length")
    ),
    "unused rows masked by multiplication": Mutant(
        GATHER_POISON,
        Mutation(
            "gpu/gather.py",
            "jnp.where(lax.broadcast_in_dim(used, value.shape, (0,)), value, jnp.zeros_like(value))",
            "value * lax.broadcast_in_dim(used.astype(jnp.float32), value.shape, (0,))",
        ),
    ),
    "weights of the other consumer": Mutant(
        GATHER, Mutation("gpu/gather.py", 'scratch["weight_s"][slot, wg]', 'scratch["weight_s"][slot, 1 - wg]')
    ),
    "a copy that nobody waits for": Mutant(
        GATHER, Mutation("gpu/gather.py", "copies = TILE_ROWS + 1", "copies = TILE_ROWS")
    ),
    "rows read after their stage is free": Mutant(
        GATHER,
        Mutation(
            "gpu/gather.py",
            'value = piece("x_s", slot)\n',
            'ring.release(filled)\n                value = piece("x_s", slot)\n',
        ),
    ),
    "every term is the first": Mutant(
        GATHER_PIECES, Mutation("gpu/gather.py", "own = term * tiles + tile", "own = tile + 0 * term")
    ),
    "every piece is the first": Mutant(
        GATHER_PIECES, Mutation("gpu/gather.py", "return column + blocks.columns, filled", "return column, filled")
    ),
    "products of the last piece": Mutant(
        GATHER_PIECES, Mutation("gpu/gather.py", "products + product", "product + 0 * products")
    ),
    "eights that do not exist are stored": Mutant(
        GATHER,
        Mutation(
            "gpu/gather.py",
            "@pl.when(eight < eights)\n                    def _() -> None:\n                        out_g",
            "@pl.when(eight >= 0)\n                    def _() -> None:\n                        out_g",
        ),
    ),
    "a gate that is not finite weighs": Mutant(
        GATHER_POISON, Mutation("gpu/permute.py", "jnp.where(jnp.isfinite(gate), gate, jnp.float32(jnp.nan))", "gate")
    ),
    "a dropped choice's gate has a gradient": Mutant(
        GATHER_POISON, Mutation("gpu/permute.py", "kept = plan.row < plan.layout.num_rows", "kept = plan.row >= 0")
    ),
    "ties go to the higher expert": Mutant(
        ROUTE,
        Mutation(
            "gpu/sm90/routing.py",
            "jnp.min(jnp.where(equal, experts.ids, jnp.full_like(clean, padded)), axis=1)",
            "jnp.max(jnp.where(equal, experts.ids, jnp.zeros_like(clean)), axis=1)",
        ),
    ),
    "an expert is chosen twice": Mutant(
        ROUTE, Mutation("gpu/sm90/routing.py", "score = jnp.where(mine, jnp.full_like(clean, FAR), score)", "pass")
    ),
    "the router's last digits left out": Mutant(
        ROUTE_TIES,
        Mutation(
            "gpu/sm90/routing.py", "z[:, 2 * padded :] + z[:, padded : 2 * padded] + z[:, :padded]", "z[:, :padded]"
        ),
    ),
    "the end of a group is in its sums": Mutant(
        ROUTE,
        Mutation(
            "gpu/sm90/routing.py",
            "_by_tile(_members(num_tokens, static, inputs), groups, NEVER)",
            "_by_tile(_members(num_tokens, static, inputs), groups, 0)",
        ),
    ),
    "every group is the first": Mutant(
        ROUTE, Mutation("gpu/sm90/routing.py", "pl.ds(group * size + place", "pl.ds(0 * group + place")
    ),
    "noise of the other half": Mutant(
        ROUTE,
        Mutation("gpu/sm90/routing.py", "device.read(refs[1], (step, wg))", "device.read(refs[1], (step, 1 - wg))"),
    ),
    "slices of tokens released too early": Mutant(
        ROUTE_DEEP, Mutation("gpu/sm90/routing.py", "ring.release(filled + k - 1)", "ring.release(filled + k)")
    ),
    "columns that are no experts are added up": Mutant(
        ROUTE, Mutation("gpu/sm90/routing.py", "self.only(jnp.exp(distance), 0.0)", "jnp.exp(distance)")
    ),
    "a token that is not finite wants an expert": Mutant(
        ROUTE_POISON, Mutation("gpu/sm90/routing.py", "mine & _down(finite, clean.shape)", "mine")
    ),
    "the gradient's last digits left out of dW": Mutant(
        ROUTE, Mutation("gpu/sm90/routing_backward.py", "reversed(range(PIECES))", "reversed(range(1))")
    ),
    "parts of the tokens past the end": Mutant(
        ROUTE,
        Mutation(
            "gpu/sm90/routing_backward.py",
            "jnp.clip(num_tokens - part * length, 0, length)",
            "jnp.full_like(part, length)",
        ),
    ),
    "sums take unused rows": Mutant(MLP, Mutation("gpu/sm90/column_sums.py", "row < size_g[i]", "row < DEPTH")),
}


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, sys.argv[1:], limit=90))
