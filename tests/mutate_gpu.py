"""Break the GPU kernels one way at a time and see the tests fail: `python tests/mutate_gpu.py [NAME...]`.

Each mutation runs in a copy of the tree. A mutant is caught by a wrong value, a race, an error of the interpreter, or
by never coming to an end. What the interpreters cannot see is left out: they run wgmma at once, so a missing
`wgmma_wait` changes nothing there (JAX 0.10.2 and 0.12), and neither does a missing `commit_smem`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 90


class Mutation(NamedTuple):
    """Replace `old` by `new` in a file of the back end."""

    file: str
    old: str
    new: str


CHECK = """
import sys
sys.path.insert(0, "tests")
import conftest, gpu_cases as gpu
{}
"""
MATMUL = 'gpu.check_matmul("packed", "bfloat16", "bfloat16", sizes=[(127, 17, 129, 70)])'
MLP = 'gpu.check_mlp("odd packed", "bfloat16", "bfloat16", sizes=[(23, 24, 1)])'

MUTATIONS = {
    "consumers do not wait for copies": (
        MATMUL,
        Mutation("launch.py", "plgpu.barrier_wait(self.full.at[slot])", "pass"),
    ),
    "producer does not wait for consumers": (
        MATMUL,
        Mutation(
            "launch.py",
            "            plgpu.barrier_wait(self.empty.at[slot])\n\n        return",
            "            pass\n\n        return",
        ),
    ),
    "stage released too early": (
        MATMUL,
        Mutation("row_matmul.py", "ring.release(filled + k - 1)", "ring.release(filled + k)"),
    ),
    "last stage not released": (MATMUL, Mutation("row_matmul.py", "ring.release(filled + slices - 1)", "pass")),
    "no barrier after masking": (
        MATMUL,
        Mutation(
            "weight_gradient.py", "plgpu.barrier_arrive(clean)\n                plgpu.barrier_wait(clean)", "pass"
        ),
    ),
    "mask one row too long": (MATMUL, Mutation("weight_gradient.py", "jnp.where(row < size", "jnp.where(row <= size")),
    "mask one row too short": (
        MATMUL,
        Mutation("weight_gradient.py", "jnp.where(row < size", "jnp.where(row < size - 1"),
    ),
    "no mask": (MATMUL, Mutation("weight_gradient.py", "@pl.when(size < DEPTH)", "@pl.when(size < 0)")),
    "mask by multiplication": (
        "import test_gpu_matmul; import numpy; test_gpu_matmul.check_poison(numpy.nan)",
        Mutation(
            "weight_gradient.py",
            "jnp.where(row < size, value, jnp.zeros_like(value))",
            "value * (row < size).astype(value.dtype)",
        ),
    ),
    "ragged ends stored whole": (
        MATMUL,
        Mutation(
            "row_matmul.py",
            "store_rows(out_s.at[wg, buffer], out_g[i], row, used,",
            "store_rows(out_s.at[wg, buffer], out_g[i], row, used | 64,",
        ),
    ),
    "second half of a tile skipped": (
        MATMUL,
        Mutation("row_matmul.py", "lax.cond(size > 0", "lax.cond((size > 0) & (wg == 0)"),
    ),
    "tiles of the wrong expert": (
        MATMUL,
        Mutation("schedule.py", "runs.expert[run], runs.first[run]", "jnp.roll(runs.expert[run], 1), runs.first[run]"),
    ),
    "bias not waited for": (
        MLP,
        Mutation("row_matmul.py", 'plgpu.barrier_wait(scratch["bias_full"].at[wg])', "pass"),
    ),
    "hidden not waited for": (
        MLP,
        Mutation("row_matmul.py", 'plgpu.barrier_wait(scratch["hidden_full"].at[2 * wg + chunk])', "pass"),
    ),
    "slope without its second term": (MLP, Mutation("gelu.py", "s + x * s * (1.0 - s)", "s + 0 * x * s * (1.0 - s)")),
    "sums take unused rows": (MLP, Mutation("column_sums.py", "row < size_g[i]", "row < DEPTH")),
}


def caught(check: str, mutation: Mutation | None) -> bool:
    """Run a check on a copy of the tree with the mutation applied; True if anything at all went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for package in ("moe_kernels", "reference", "tests"):
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            path = copy / "moe_kernels/backends/gpu" / mutation.file
            text = path.read_text(encoding="utf-8")
            assert text.count(mutation.old) == 1, f"{mutation.old!r} is {text.count(mutation.old)} times in {path.name}"
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}
        try:
            run = subprocess.run(
                [sys.executable, "-c", CHECK.format(check)],
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True
        if mutation is None and run.returncode:
            print(run.stderr[-2000:])
        return run.returncode != 0 or "RACE DETECTED" in run.stdout


def main(names: list[str]) -> int:
    """Check that nothing is caught unbroken, then that every mutant is."""
    chosen = {name: MUTATIONS[name] for name in names} if names else MUTATIONS
    for check in {check for check, _ in chosen.values()}:
        if caught(check, None):
            print(f"fails unbroken: {check}")
            return 1
    survived = []
    for name, (check, mutation) in chosen.items():
        dead = caught(check, mutation)
        print(f"{'caught' if dead else 'SURVIVED'}: {name}", flush=True)
        survived += [] if dead else [name]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    return len(survived)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
