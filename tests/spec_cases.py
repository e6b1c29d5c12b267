"""A layer's options by name, as tests put them together, and what of them is its spec and what its inputs."""

import dataclasses

from moe_kernels import ExchangeSpec, MoeSpec, RouteInputs


def spec_and_inputs(**options) -> tuple[MoeSpec, RouteInputs]:
    def taken(names):
        return {name: options.pop(name) for name in names if name in options}

    inputs = RouteInputs(**taken(RouteInputs._fields))
    exchange = ExchangeSpec(**taken(field.name for field in dataclasses.fields(ExchangeSpec)))
    return MoeSpec(exchange=exchange, **options), inputs
