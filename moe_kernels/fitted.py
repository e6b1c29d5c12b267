"""What TPU kernels take of VMEM beside their arrays: constants of `fitted.json`, fitted to what one compiler reports.

`benchmarks/fit_vmem.py` fits them again; tests marked `aot` compare them with the compiler that is installed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The constants, in the order of the file."""

    compiler: str
    """That reported what they are fitted to."""
    margin: float
    """Share of all arrays that the compiler adds for alignment and bookkeeping."""
    slack_bytes: int
    """That it adds to any kernel."""
    product_share: float
    """Bytes of a product that is added to a result in float32, for each byte of the result (matmul, backward)."""
    weight_product_rows: int
    """Rows, at most, of the part of a product for weights beside which an activation is computed again."""
    route_entry_bytes: dict[str, dict[str, int | float]]
    """Bytes kept for each entry of a tile of tokens, by dtype and pass of the router: those of v4, which needs most.
    Products of float32 work on copies in bfloat16 pieces."""
    hidden_copies: dict[str, int]
    """Copies of a piece of a forward pass's hidden layer, by chip."""
    products_of_a_pair: dict[str, int]
    """Of the two products of a gated matmul that are added to dx, those that are there at once, by chip."""


FITTED = Fitted(**json.loads(FILE.read_text(encoding="utf-8")))
