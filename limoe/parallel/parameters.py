"""Names of parameters: the path of a leaf in a tree of them."""

import jax


def parameter_path(path: jax.tree_util.KeyPath) -> str:
    """The names that lead to a parameter, joined by slashes, without the `value` that flax adds at the end.

    >>> params = {"blocks": [{"mlp": {"w1": 0.0}}]}
    >>> [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    ['blocks/0/mlp/w1']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
