"""Break the GPU kernels one way at a time and see the tests fail: `python tests/mutate_gpu.py [NAME...]`.

What the interpreters cannot see is left out: they run wgmma at once, so a missing `wgmma_wait` changes nothing there
(JAX 0.10.2 and 0.12), and neither does a missing `commit_smem`.
"""

import sys

from mutate import Mutant, Mutation, main

BEFORE = """
import sys
sys.path.insert(0, "tests")
import conftest, gpu_cases as gpu
"""
MATMUL = BEFORE + 'gpu.check_matmul("packed", "bfloat16", "bfloat16", sizes=[(127, 17, 129, 70)])'
MLP = BEFORE + 'gpu.check_mlp("odd packed", "bfloat16", "bfloat16", sizes=[(23, 24, 1)])'
POISON = BEFORE + "import test_gpu_matmul; import numpy; test_gpu_matmul.check_poison(numpy.nan)"

MUTATIONS = {
    "consumers do not wait for copies": Mutant(
        MATMUL,
        Mutation("gpu/launch.py", "plgpu.barrier_wait(self.full.at[slot])", "pass"),
    ),
    "producer does not wait for consumers": Mutant(
        MATMUL,
        Mutation(
            "gpu/launch.py",
            "            plgpu.barrier_wait(self.empty.at[slot])\n\n        return",
            "            pass\n\n        return",
        ),
    ),
    "stage released too early": Mutant(
        MATMUL,
        Mutation("gpu/row_matmul.py", "ring.release(filled + k - 1)", "ring.release(filled + k)"),
    ),
    "last stage not released": Mutant(
        MATMUL, Mutation("gpu/row_matmul.py", "ring.release(filled + slices - 1)", "pass")
    ),
    "no barrier after masking": Mutant(
        MATMUL,
        Mutation(
            "gpu/weight_gradient.py", "plgpu.barrier_arrive(clean)\n                plgpu.barrier_wait(clean)", "pass"
        ),
    ),
    "mask one row too long": Mutant(
        MATMUL, Mutation("gpu/weight_gradient.py", "jnp.where(row < size", "jnp.where(row <= size")
    ),
    "mask one row too short": Mutant(
        MATMUL,
        Mutation("gpu/weight_gradient.py", "jnp.where(row < size", "jnp.where(row < size - 1"),
    ),
    "no mask": Mutant(MATMUL, Mutation("gpu/weight_gradient.py", "@pl.when(size < DEPTH)", "@pl.when(size < 0)")),
    "mask by multiplication": Mutant(
        POISON,
        Mutation(
            "gpu/weight_gradient.py",
            "jnp.where(row < size, value, jnp.zeros_like(value))",
            "value * (row < size).astype(value.dtype)",
        ),
    ),
    "ragged ends stored whole": Mutant(
        MATMUL,
        Mutation(
            "gpu/row_matmul.py",
            "store_rows(out_s.at[wg, buffer], out_g[i], row, used,",
            "store_rows(out_s.at[wg, buffer], out_g[i], row, used | 64,",
        ),
    ),
    "second half of a tile skipped": Mutant(
        MATMUL,
        Mutation("gpu/row_matmul.py", "lax.cond(size > 0", "lax.cond((size > 0) & (wg == 0)"),
    ),
    "tiles of the wrong expert": Mutant(
        MATMUL,
        Mutation(
            "gpu/schedule.py", "runs.expert[run], runs.first[run]", "jnp.roll(runs.expert[run], 1), runs.first[run]"
        ),
    ),
    "bias not waited for": Mutant(
        MLP,
        Mutation("gpu/row_matmul.py", 'plgpu.barrier_wait(scratch["bias_full"].at[wg])', "pass"),
    ),
    "hidden not waited for": Mutant(
        MLP,
        Mutation("gpu/row_matmul.py", 'plgpu.barrier_wait(scratch["hidden_full"].at[2 * wg + chunk])', "pass"),
    ),
    "slope without its second term": Mutant(
        MLP, Mutation("gpu/gelu.py", "s + x * s * (1.0 - s)", "s + 0 * x * s * (1.0 - s)")
    ),
    "sums take unused rows": Mutant(MLP, Mutation("gpu/column_sums.py", "row < size_g[i]", "row < DEPTH")),
}


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, sys.argv[1:], limit=90))
