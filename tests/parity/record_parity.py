"""Record what the blocks of published models give for the numbers that parity_cases.py draws, in float64.

    pip install -e '.[parity]'
    python tests/parity/record_parity.py                 # all of Hugging Face transformers
    PYTHONPATH=VMOE:VISION_TRANSFORMER python tests/parity/record_parity.py v_moe

The files in recorded/ were made by torch 2.13.0+cpu and transformers 5.24.0 with numpy 2.4.6; that of V-MoE by jax
0.10.2, flax 0.12.8, numpy 2.4.6 and unmodified checkouts of google-research/vmoe (942a78b) and
google-research/vision_transformer (c6de1e5). Blocks are in inference mode, with eager experts. Some of Hugging Face's
routers compute in float32, whatever the dtype of the block is.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

import numpy as np
from parity_cases import BATCH, CASES, LENGTH, RECORDED, WIDTH, Case, Drawn, draw, kept_of_gradient

Gradients = dict[str, np.ndarray]


def by_hugging_face(case: Case, given: Drawn) -> Gradients:
    """Run a block of transformers, forward and backward."""
    import torch
    import transformers

    torch.set_num_threads(1)
    module = importlib.import_module(f"transformers.models.{case.module}.modeling_{case.module}")
    config = getattr(transformers, str(case.config))(**case.settings, experts_implementation="eager")
    block = getattr(module, case.block)(config).double().eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    assert shapes == case.tensors, f"{case.block} has {shapes}"
    block.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in given.tensors.items()})
    tokens = torch.from_numpy(given.tokens).reshape(BATCH, LENGTH, WIDTH).requires_grad_()
    output = block(tokens)
    output = output[0] if isinstance(output, tuple) else output
    output.reshape(-1, WIDTH).backward(torch.from_numpy(given.doutput))
    # An expert without tokens may have no gradient at all.
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in block.named_parameters()}
    found = {"output": output, "tokens": tokens.grad, **gradients}
    return {name: value.detach().numpy() for name, value in found.items()}


def by_vmoe(case: Case, given: Drawn) -> Gradients:
    """Run V-MoE's block, forward and backward."""
    import flax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    module = importlib.import_module(case.module)
    block = getattr(module, case.block)(**case.settings, dtype=jnp.float64)

    def run(tokens: jax.Array, tensors: dict[str, jax.Array]) -> jax.Array:
        output, _ = block.apply({"params": flax.traverse_util.unflatten_dict(tensors, sep=".")}, tokens)
        return output.reshape(-1, WIDTH)

    output, pull = jax.vjp(run, given.tokens.reshape(BATCH, LENGTH, WIDTH), given.tensors)
    dtokens, dtensors = pull(given.doutput)
    return jax.tree.map(np.asarray, {"output": output, "tokens": dtokens, **dtensors})


def record(name: str) -> None:
    """Run a block and write its file. Arrays are stored in float32, and so as near to float64 as 6e-8."""
    case, given = CASES[name], draw(name)
    found = by_hugging_face(case, given) if case.of_hugging_face else by_vmoe(case, given)
    packages = ("torch", "transformers", "numpy") if case.of_hugging_face else ("jax", "flax", "numpy")
    arrays = {"output": found.pop("output").reshape(-1, WIDTH), "dtokens": found.pop("tokens").reshape(-1, WIDTH)}
    arrays |= {f"d {tensor}": kept_of_gradient(tensor, gradient) for tensor, gradient in found.items()}
    assert all(np.isfinite(array).all() for array in arrays.values())
    arrays = {key: np.asarray(array, np.float32) for key, array in arrays.items()}
    versions = np.array([f"{package} {version(package)}" for package in packages])
    RECORDED.mkdir(exist_ok=True)
    np.savez(RECORDED / f"{name}.npz", **arrays, versions=versions)
    print(f"{name}: {', '.join(versions)}")


if __name__ == "__main__":
    for name in sys.argv[1:] or [name for name, case in CASES.items() if case.of_hugging_face]:
        record(name)
