"""LIMoE: a language-image mixture of experts trained contrastively in one tower (arXiv 2206.02770)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limoe.use.model import InputError, Model, TokenExperts, load

__version__ = "0.2.0"
__all__ = ["InputError", "Model", "TokenExperts", "load"]


def __getattr__(name: str) -> Any:
    """Import the Python interface when it is first used, so that `limoe --help` need not wait for JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'limoe' has no attribute {name!r}")
    from limoe.use import model

    return getattr(model, name)
