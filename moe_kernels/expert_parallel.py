"""The names of 0.1.0 for the layer on a mesh. Each raises an error that says what replaces it."""

from typing import Any, NoReturn


def moe_mlp(*arguments: Any, **options: Any) -> NoReturn:
    """Raise TypeError: use `moe_kernels.moe_mlp` with `mesh`.

    >>> moe_mlp()
    Traceback (most recent call last):
    TypeError: expert_parallel.moe_mlp is now moe_kernels.moe_mlp(tokens, router, weights, spec, inputs, mesh=mesh)
    """
    raise TypeError(
        "expert_parallel.moe_mlp is now moe_kernels.moe_mlp(tokens, router, weights, spec, inputs, mesh=mesh)"
    )


def moe_mlp_on_shard(*arguments: Any, **options: Any) -> NoReturn:
    """Raise TypeError: use `moe_kernels.moe_mlp_on_shard`.

    >>> moe_mlp_on_shard()
    Traceback (most recent call last):
    TypeError: expert_parallel.moe_mlp_on_shard is now moe_kernels.moe_mlp_on_shard(tokens, router, weights, spec, ...)
    """
    raise TypeError(
        "expert_parallel.moe_mlp_on_shard is now moe_kernels.moe_mlp_on_shard(tokens, router, weights, spec, ...)"
    )
