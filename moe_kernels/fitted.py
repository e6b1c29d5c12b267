"""Constants of `fitted.json` for the VMEM that TPU kernels take beyond their arrays, fitted to one compiler's reports.

`benchmarks/fit_vmem.py` fits them again. Tests marked `aot` compare them with the installed compiler.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The constants in the order of the file."""

    compiler: str
    """The compiler whose reports they are fitted to."""
    margin: float
    """What the compiler adds for alignment and bookkeeping, as a share of the bytes of all arrays."""
    slack_bytes: int
    """Bytes that the compiler adds to every kernel."""
    product_share: float
    """Bytes of a product that is added to a float32 result, for each byte of the result (matmul, backward)."""
    weight_product_rows: int
    """The most rows of a part of a weight gradient's product, where the kernel also computes an activation again."""
    route_entry_bytes: dict[str, dict[str, int | float]]
    """Bytes for each entry of a tile of tokens, by dtype and pass of the router, on v4, which needs most. Float32
    products work on copies in bfloat16 pieces."""
    hidden_copies: dict[str, int]
    """Copies of a piece of the hidden layer in a forward pass, by chip."""
    products_of_a_pair: dict[str, int]
    """How many of the two products that a gated matmul adds to dx exist at the same time, by chip."""


FITTED = Fitted(**json.loads(FILE.read_text(encoding="utf-8")))
