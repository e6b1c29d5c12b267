"""Compile a layer without a capacity limit for four H200s on a machine without: `python gpu_exchange_aot.py`.

Prints the program of its value and gradient.
"""

import gpu_aot
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_kernels import ExchangeSpec, MlpWeights, MoeSpec, moe_mlp

TOKENS, WIDTH, HIDDEN, EXPERTS, DEVICES = 4096, 256, 512, 8, 4


def main() -> None:
    mesh = Mesh(np.array(gpu_aot.chips("H200", DEVICES)), ("expert",))
    spec = MoeSpec(num_choices=2, num_groups=DEVICES, exchange=ExchangeSpec(buffer_factor=2))

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def loss(tokens, router, weights):
        output = moe_mlp(tokens, router, weights, spec, mesh=mesh)
        return jnp.sum(jnp.sin(output.tokens.astype(jnp.float32)))

    e, d, f = EXPERTS, WIDTH, HIDDEN
    weights = MlpWeights(*(array(s, jnp.float32, "expert") for s in ((e, d, f), (e, f), (e, f, d), (e, d))))
    arguments = array((TOKENS, d), jnp.bfloat16, "expert"), array((d, e), jnp.float32), weights
    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*arguments).lower(lowering_platforms=("cuda",))
    print(lowered.compile().as_text())


if __name__ == "__main__":
    main()
