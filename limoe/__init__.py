"""LIMoE: a language-image mixture of experts trained contrastively in one tower (arXiv 2206.02770)."""

__version__ = "0.1.0"
