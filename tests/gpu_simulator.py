"""GPU kernels on a CPU: JAX's Mosaic GPU interpreter, with race detection, for `install_simulator`.

Copies read NaN past the end of an array, where a GPU would read 0, so that nothing can come to depend on either; those
that promise to stay inside fail there. The warpgroups of a block are threads that wait for each other inside XLA's own
threads, of which there must be enough: set the environment variable NPROC to 8 or more before JAX starts on a machine
with fewer cores, else they can hang.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import jax
import jax.core
import numpy as np
from jax._src import callback as jax_callback
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic.interpret import utils as interpret_utils
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import Barrier
from jax._src.state.types import TransposeTransform

COPY_CLOCKS = 31


@functools.cache
def simulate(*, in_bounds: bool) -> Any:
    """Parameters of the interpreter, which is made faster, and on JAX 0.10.2 completed, when first asked for."""
    _complete()
    # Copies that share a clock seem ordered: with the default of one, a missing wait for a copy went unseen.
    return InterpretGPUParams(
        detect_races=True,
        out_of_bounds_reads="raise" if in_bounds else "uninitialized",
        num_tma_threads_per_device=COPY_CLOCKS,
    )


@functools.cache
def _complete() -> None:
    thread_map._run_jaxpr = _run_jaxpr
    wgmma = gpu_callbacks.wgmma
    # "to_access" is new with the transposed operands of JAX 0.12, which also wants its own arrays in callbacks.
    if not hasattr(interpret_utils, "to_access"):
        wgmma = _wgmma
        # Callbacks run on the host. JAX's own arrays, made one by one of what they get and give, took most of the time.
        jax_callback.io_callback_impl = _call_back
        gpu_callbacks.jnp = np
    # A GPU makes infinities and NaN without a word, NumPy warns.
    gpu_callbacks.wgmma = np.errstate(all="ignore")(wgmma)


def _call_back(*args: Any, callback: Any, **_: Any) -> Any:
    """Call with NumPy's arrays as they come from XLA."""
    return jax.tree.map(np.asarray, callback(*args))


def _wgmma(
    *,
    token: Any,
    device_id: Any,
    grid_point_coords: Any,
    thread_id: Any,
    acc_allocation_key_as_array: Any,
    acc_transforms: Any,
    acc_dtype: Any,
    a_allocation_key_as_array: Any,
    a_transforms: Any,
    b_allocation_key_as_array: Any,
    b_transforms: Any,
    source_info: Any = None,
) -> Any:
    """`acc += a @ b` at once, with operands that may be transposed, and their reads checked for races."""
    memory = gpu_callbacks._get_shared_memory()
    device, thread = int(device_id), int(thread_id)
    worker = memory.get_global_thread_id(device, thread)

    def read(key_array: Any, transforms: Any) -> np.ndarray:
        key = gpu_callbacks.HostAllocationKey.from_array(key_array)
        transforms = gpu_callbacks._remove_noop_transforms(transforms)
        indexed = tuple(t for t in transforms if not isinstance(t, TransposeTransform))
        part = interpret_utils.to_range(jax.tree.map(int, indexed))
        value, _, clock = memory.get_buffer_content(key, part, worker)
        gpu_callbacks.get_races().check_read(device, thread, clock, key, part, source_info=source_info)
        assert value is not None
        for transform in transforms:
            if isinstance(transform, TransposeTransform):
                value = value.transpose(transform.permutation)
        return value

    assert not acc_transforms
    key = gpu_callbacks.HostAllocationKey.from_array(acc_allocation_key_as_array)
    acc, _, _ = memory.get_buffer_content(key, (), worker)
    assert acc is not None
    a, b = read(a_allocation_key_as_array, a_transforms), read(b_allocation_key_as_array, b_transforms)
    # Converted first: NumPy has quick products of two float32 matrices, and no others.
    memory.store_buffer_content(key, (), acc + a.astype(acc_dtype) @ b.astype(acc_dtype), worker)
    return token


# Programs that are kept. Each takes hundreds of memory maps, and XLA crashes where Linux refuses more (65,530).
KEPT = 32
_compiled: dict[int, tuple[Any, Any]] = {}
_compiling = threading.Lock()


def _run_jaxpr(jaxpr: Any, consts: Any, *args: Any) -> None:
    """Run a kernel's program, compiled once and not for every warpgroup of every block of every call."""
    with _compiling:
        # The program is kept beside the executable, so that its id is not given to another one.
        _, executable = _compiled.pop(id(jaxpr), (jaxpr, None))
        if executable is None:
            run = lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args)  # noqa: E731
            executable = jax.jit(run).lower(consts, *args).compile({"xla_backend_optimization_level": "0"})
        _compiled[id(jaxpr)] = jaxpr, executable  # the last one that was used
        while len(_compiled) > KEPT:
            del _compiled[next(iter(_compiled))]
    try:
        executable(consts, *args)
    except Exception:
        _fail_waiting_threads()
        raise


def _fail_waiting_threads() -> None:
    """Let every wait of the kernel's other warpgroups fail, now and later, where they would wait for this one."""
    memory = gpu_callbacks._shared_memory
    if memory is None:  # a TPU kernel, whose interpreter runs its threads in the same way
        return
    for barrier in list(memory.mem.values()):
        if isinstance(barrier, Barrier):
            with barrier.cv:
                barrier.phase += 1 << 20
                barrier.cv.notify_all()
