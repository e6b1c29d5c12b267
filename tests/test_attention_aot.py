"""The attention kernels through the real TPU compiler: they fit every chip, and nothing is moved around them."""

import re

import jax
import jax.numpy as jnp
import pytest
from tpu_aot import TOPOLOGIES, Chip

from limoe.config.presets import preset
from limoe.model.attention import attend, geometry_of
from limoe.parallel.mesh import Placement

pytestmark = pytest.mark.aot

EVERY_DAY = {("v4", "b16"), ("v5p", "l16"), ("v6e", "h14")}


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        (chip, name) if (chip, name) in EVERY_DAY else pytest.param(chip, name, marks=pytest.mark.full)
        for chip in TOPOLOGIES
        for name in ("b16", "l16", "h14")
    ],
)
def test_they_compile_and_take_what_the_projections_write(chip, name):
    model = preset(name).model
    width, tokens = model.width, 8 * geometry_of(model).length
    chip = Chip(chip)
    placement = Placement(chip.mesh, preset(name).mesh)

    def attention(x, weights):
        def result(x, weights):
            query, key, value, out = (jnp.split(weights, 4, axis=1)[n] for n in range(4))
            return attend(x @ query, x @ key, x @ value, None, model, placement) @ out

        y, pull = jax.vjp(result, x, weights)
        return y, *pull(y)

    jitted = jax.jit(attention)
    arguments = chip.array((tokens, width), jnp.bfloat16), chip.array((width, 4 * width), jnp.bfloat16)
    text = jitted.trace(*arguments).lower(lowering_platforms=("tpu",)).compile().as_text()
    for kernel in ("attention_forward", "attention_backward"):
        assert len(re.findall(rf"%{kernel}[\w.-]* = .* custom-call\(", text)) == 1
    # Scores stay on the chip, and [T, D] goes from matmul to kernel to matmul as it lies.
    assert not re.search(rf"\[[\d,]*{model.num_image_tokens},{model.num_image_tokens}\]", text)
    assert not re.search(rf"= bf16\[{tokens},{width}\]\S* (copy|transpose)\(", text)
