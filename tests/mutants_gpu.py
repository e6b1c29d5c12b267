"""How the GPU kernels are broken one way at a time, and the checks that must notice it.

What the interpreters cannot see is left out: they run wgmma at once, so a missing `wgmma_wait` changes nothing there
(JAX 0.10.2 and 0.12), and neither does a missing `commit_smem` (0.10.2) or
`wait_smem_to_gmem`.
"""

import math
from functools import partial

import gpu_cases
import test_gpu_matmul
import test_gpu_permute
import test_gpu_route
from mutate import Mutant

ODD = dict(name="odd packed", dtype="bfloat16", sizes=[(23, 24, 1)])
MATMUL = partial(gpu_cases.check_matmul, "packed", "bfloat16", "bfloat16", sizes=[(127, 17, 129, 70)])
GATED = partial(gpu_cases.check_matmul, **ODD, weight_dtype="float32", epilogue="gated", activation="silu")
POINTWISE = partial(gpu_cases.check_matmul, **ODD, weight_dtype="float32", epilogue="pointwise", activation="gelu_erf")
MLP = partial(gpu_cases.check_mlp, **ODD, weight_dtype="bfloat16")
POISON = partial(test_gpu_matmul.check_poison, math.nan)
GATHER = partial(test_gpu_permute.check, "groups", "bfloat16", "zipf")
GATHER_ONE = partial(test_gpu_permute.check, "one row", "bfloat16")
GATHER_PIECES = partial(test_gpu_permute.check, "two choices", "bfloat16")
GATHER_POISON = partial(test_gpu_permute.check_poison, math.inf)
ROUTE = partial(test_gpu_route.check_case, "one more than a tile")
ROUTE_DEEP = partial(test_gpu_route.check_case, "all choices")
ROUTE_TIES = test_gpu_route.test_near_ties_and_zeros_of_both_signs_are_decided_as_in_float32
ROUTE_POISON = partial(test_gpu_route.check_poison, math.nan)

MUTANTS = {
    "consumers do not wait for copies": Mutant(
        MATMUL,
        "plgpu.barrier_wait(self.full.at[slot])",
        "pass",
    ),
    "producer does not wait for consumers": Mutant(
        MATMUL,
        "            plgpu.barrier_wait(self.empty.at[slot])\n\n        return",
        "            pass\n\n        return",
    ),
    "stage released too early": Mutant(
        MATMUL,
        "ring.release(filled + k - 1)",
        "ring.release(filled + k)",
    ),
    "last stage not released": Mutant(MATMUL, "ring.release(filled + num_stages - 1)", "None"),
    "no barrier after masking": Mutant(
        MATMUL,
        "plgpu.barrier_arrive(scratch.clean)\n        plgpu.barrier_wait(scratch.clean)",
        "pass",
    ),
    "mask one row too long": Mutant(MATMUL, "jnp.where(row < size,", "jnp.where(row <= size,"),
    "mask one row too short": Mutant(
        MATMUL,
        "jnp.where(row < size,",
        "jnp.where(row < size - 1,",
    ),
    "no mask": Mutant(MATMUL, "pl.when(size < DEPTH)", "pl.when(size < 0)"),
    "mask by multiplication": Mutant(
        POISON,
        "jnp.where(row < size, value, jnp.zeros_like(value))",
        "value * (row < size).astype(value.dtype)",
    ),
    "ragged ends stored whole": Mutant(
        MATMUL,
        "store_rows(scratch.out.at[wg, n % 2], output, row, used,",
        "store_rows(scratch.out.at[wg, n % 2], output, row, used | 64,",
    ),
    "second half of a tile skipped": Mutant(
        MATMUL,
        "lax.cond(size > 0",
        "lax.cond((size > 0) & (wg == 0)",
    ),
    "tiles of the wrong expert": Mutant(
        MATMUL,
        "runs.expert[run], runs.first[run]",
        "jnp.roll(runs.expert[run], 1), runs.first[run]",
    ),
    "bias not waited for": Mutant(
        MLP,
        "plgpu.barrier_wait(scratch.bias.full.at[wg])",
        "pass",
    ),
    "the gate stands where what it lets pass does": Mutant(
        GATED, "tile.outputs.hidden, column + CHUNK, up", "tile.outputs.hidden, column + CHUNK, gate"
    ),
    "products of a gate and the gate": Mutant(GATED, "up = tile.rounded(chunk + 1)", "up = tile.rounded(chunk)"),
    "products of the next columns": Mutant(
        GATED, "lax.div(column, jnp.int32(2))", "lax.rem(column + CHUNK, jnp.int32(256))"
    ),
    "a gate's gradient without its slope": Mutant(
        GATED, "up.astype(jnp.float32) * slope", "up.astype(jnp.float32)", beside="_in_turns"
    ),
    "gradients of a pair the wrong way round": Mutant(
        GATED, "dweight, dup = _apart(gradients.weight)", "dup, dweight = _apart(gradients.weight)"
    ),
    "a matmul's gradient past its activation": Mutant(
        POINTWISE, "dout if hidden is None else", "dout if weights.up is None else"
    ),
    "a bias that is not added": Mutant(POINTWISE, "bias=float32_of(weights.bias)", "bias=None"),
    "hidden not waited for": Mutant(
        MLP,
        "plgpu.barrier_wait(tile.hidden.full.at[2 * tile.consumer + chunk])",
        "pass",
    ),
    "slope without its second term": Mutant(MLP, "s + x * s * (1.0 - s)", "s + 0 * x * s * (1.0 - s)"),
    "indices past the end are fetched": Mutant(
        GATHER,
        "at = jnp.minimum(inputs.index[own, consumer, row + n], inputs.x.shape[0] - 1)",
        "at = inputs.index[own, consumer, row + n]",
    ),
    "rows of tiles past the end are fetched": Mutant(
        GATHER_ONE,
        "jnp.minimum(tile * TILE_ROWS + first + n, inputs.other.shape[0] - 1)",
        "tile * TILE_ROWS + first + n",
    ),
    "the row behind the last is added": Mutant(GATHER, "[slot, wg] < self.inputs.x", "[slot, wg] <= self.inputs.x"),
    "unused rows masked by multiplication": Mutant(
        GATHER_POISON,
        "jnp.where(lax.broadcast_in_dim(used, value.shape, (0,)), value, jnp.zeros_like(value))",
        "value * lax.broadcast_in_dim(used.astype(jnp.float32), value.shape, (0,))",
    ),
    "weights of the other consumer": Mutant(GATHER, "scratch.weight[slot, wg]", "scratch.weight[slot, 1 - wg]"),
    "a copy that nobody waits for": Mutant(GATHER, "copies = TILE_ROWS + 1", "copies = TILE_ROWS + 0"),
    "rows read after their stage is free": Mutant(
        GATHER,
        "value = piece(scratch.x)\n",
        "scratch.ring.release(filled)\n        value = piece(scratch.x)\n",
    ),
    "every term is the first": Mutant(
        GATHER_PIECES, "own, full = term * self.tiles + tile", "own, full = tile + 0 * term"
    ),
    "every piece is the first": Mutant(
        GATHER_PIECES, "return column + self.scratch.x.shape[-1], lax", "return column, lax"
    ),
    "products of the last piece": Mutant(GATHER_PIECES, "products + product", "product + 0 * products"),
    "eights that do not exist are stored": Mutant(
        GATHER,
        "@pl.when(eight < outputs.rows.shape[0])\n            def _() -> None:\n                outputs.rows",
        "@pl.when(eight >= 0)\n            def _() -> None:\n                outputs.rows",
    ),
    "a gate that is not finite weighs": Mutant(
        GATHER_POISON,
        "jnp.where(jnp.isfinite(gate), gate, jnp.float32(jnp.nan))",
        "gate",
        beside="device, weight=weight",
    ),
    "a dropped choice's gate has a gradient": Mutant(
        GATHER_POISON, "kept = plan.row < plan.layout.num_rows", "kept = plan.row >= 0"
    ),
    "ties go to the higher expert": Mutant(
        ROUTE,
        "jnp.min(jnp.where(equal, experts.ids, jnp.full_like(clean, clean.shape[1])), axis=1)",
        "jnp.max(jnp.where(equal, experts.ids, jnp.zeros_like(clean)), axis=1)",
    ),
    "an expert is chosen twice": Mutant(ROUTE, "score = jnp.where(mine, jnp.full_like(clean, FAR), score)", "pass"),
    "the router's last digits left out": Mutant(
        ROUTE_TIES,
        "z[:, 2 * padded :] + z[:, padded : 2 * padded] + z[:, :padded]",
        "z[:, :padded]",
    ),
    "the end of a group is in its sums": Mutant(
        ROUTE,
        "_by_tile(_members(num_tokens, static, inputs), groups, NEVER)",
        "_by_tile(_members(num_tokens, static, inputs), groups, 0)",
    ),
    "every group is the first": Mutant(ROUTE, "pl.ds(group * size + place", "pl.ds(0 * group + place"),
    "noise of the other half": Mutant(
        ROUTE,
        "device.read(inputs.noise, (step, wg))",
        "device.read(inputs.noise, (step, 1 - wg))",
    ),
    "slices of tokens released too early": Mutant(
        ROUTE_DEEP, "ring.release(filled + k - 1)", "ring.release(filled + k)"
    ),
    "columns that are no experts are added up": Mutant(ROUTE, "self.only(jnp.exp(distance), 0.0)", "jnp.exp(distance)"),
    "a token that is not finite wants an expert": Mutant(ROUTE_POISON, "mine & experts.spread(finite)", "mine"),
    "the gradient's last digits left out of dW": Mutant(ROUTE, "reversed(range(PIECES))", "reversed(range(1))"),
    "parts of the tokens past the end": Mutant(
        ROUTE,
        "jnp.clip(num_tokens - part * length, 0, length)",
        "jnp.full_like(part, length)",
    ),
    "sums take unused rows": Mutant(MLP, "row < inputs.size[i]", "row < DEPTH"),
}
