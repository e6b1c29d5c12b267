"""`python -m moe_kernels explain`: which back end runs a layer of a given shape on a chip, and why others do not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import jax

from moe_kernels import Explanation, GluWeights, MlpWeights, MoeSpec, explain
from moe_kernels.chips import TPUS

_COUNTS = {
    "tokens": "tokens on one device (T)",
    "width": "width of a token (D)",
    "expert-width": "width of an expert's hidden layer (F)",
    "experts": "experts on all devices together (E)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments (default: those of the process)."""
    parser = argparse.ArgumentParser("python -m moe_kernels", description=__doc__)
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser("explain", description=__doc__)
    command.add_argument("--chip", required=True, choices=[*TPUS])
    for name, text in _COUNTS.items():
        command.add_argument(f"--{name}", required=True, type=int, help=text)
    command.add_argument("--choices", type=int, default=1, help="experts that each token chooses (K)")
    command.add_argument("--groups", type=int, default=1, help="groups of tokens; each has its own capacity (G)")
    command.add_argument(
        "--capacity-factor", help="capacity over the mean load of an expert (none: nothing is dropped)"
    )
    command.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    command.add_argument("--gated", action="store_true", help="gated experts (SwiGLU)")
    command.add_argument("--shards", type=int, default=1, help="devices that share the experts")
    command.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
        found = _explain(given)
    except ValueError as error:
        command.error(str(error))
    print(json.dumps(found.as_json(), indent=2) if given.json else found)


def _explain(given: argparse.Namespace) -> Explanation:
    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, given.dtype)

    e, d, f = given.experts, given.width, given.expert_width
    if given.gated:
        weights = GluWeights(array(e, d, f), array(e, d, f), array(e, f, d))
    else:
        weights = MlpWeights(array(e, d, f), array(e, f), array(e, f, d), array(e, d))
    spec = MoeSpec(num_choices=given.choices, num_groups=given.groups, capacity_factor=given.capacity_factor)
    return explain(array(given.tokens, d), array(d, e), weights, spec, chip=given.chip, shards=given.shards)


if __name__ == "__main__":
    main()
