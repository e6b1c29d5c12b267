"""`limoe plan`: compile the real train step for a TPU pod that is not here, and compute its memory, work and time.

Nothing runs. Memory is what the compiler assigned to the program. FLOPs, bytes and exchanges are counted in the
compiled program, with the trips of its loops. Times are modelled by the roofline: an instruction takes the longer of
its matmuls at peak (padded to the matrix unit) and its traffic at full bandwidth. On request they are also modelled by
the compiler's own schedule (scheduled.py).
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from limoe.config.schema import Config, ConfigError
from limoe.model.describe import describe
from limoe.model.moe import RoutingContext
from limoe.model.tower import scale_images
from limoe.parallel.mesh import Placement, place
from limoe.plan.compiler import read_schedules
from limoe.plan.hlo import Program, Run
from limoe.plan.hlo_work import Collective, axes_of, collectives, kernels, matmuls
from limoe.plan.host_input import HostInput, host_input
from limoe.plan.overlap import Cost, Times, schedule
from limoe.plan.pods import Pod, find_pod
from limoe.plan.prices import at_peak, exchange_seconds, through_memory
from limoe.plan.scheduled import NOT_ASKED, ScheduledStep, schedule_step
from limoe.train.gradient import step_key
from limoe.train.step import Counts, Training, compile_step, prepare

SECONDS_OF_A_DAY = 86_400


class Memory(NamedTuple):
    """Bytes of one device, as the compiler assigned them.

    `activations` are what the backward pass keeps, computed from the model. `temporary` is all else that the step needs
    besides its arguments.
    """

    parameters: int
    optimizer: int
    batch: int
    activations: int
    temporary: int
    program: int


@dataclass(frozen=True, kw_only=True)
class PodPlan:
    """The figures of a configuration on a pod. Every time is modelled. Figures are of one device unless they say
    otherwise."""

    preset: str
    topology: str
    num_devices: int
    num_chips: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    """The settings of rematerialisation, sharding and chunks."""
    batch_size: int
    steps: int
    fits: bool
    memory_per_chip_bytes: int
    hbm_bytes: int
    model_flops_per_step: int
    compile_seconds: float
    memory: Memory | None = None
    """None, like the next six, if the compiler refused the program because it does not fit."""
    flops_per_step: int | None = None
    collective_bytes: dict[str, dict[str, int]] | None = None
    """Bytes by kind of collective and by mesh axes."""
    num_collectives: dict[str, dict[str, int]] | None = None
    times: Times | None = None
    modelled_step_seconds: float | None = None
    modelled_mfu: float | None = None
    scheduled: ScheduledStep = NOT_ASKED
    num_hosts: int = 1

    @property
    def host_input(self) -> HostInput | None:
        """What each host must read and decode; None if the time of a step is not known."""
        seconds = self.modelled_step_seconds
        return host_input(self.num_hosts, self.batch_size, seconds) if seconds else None

    @property
    def scheduled_mfu(self) -> float | None:
        """The utilisation by the compiler's own schedule; None if that is not known."""
        if self.modelled_mfu is None or self.times is None or self.scheduled.times is None:
            return None
        return self.modelled_mfu * self.times.step / self.scheduled.times.step

    def as_json(self) -> dict[str, Any]:
        """The fields of `limoe plan --json`."""
        tree = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("times", "scheduled")}
        seconds, other = self.modelled_step_seconds, self.scheduled.times
        return {
            **tree,
            "memory": self.memory and self.memory._asdict(),
            "modelled_times": self.times and {**self.times._asdict(), "step": self.times.step},
            "modelled_pairs_per_second": seconds and self.batch_size / seconds,
            "modelled_days": seconds and self.steps * seconds / SECONDS_OF_A_DAY,
            "modelled_chip_hours": seconds and self.steps * seconds * self.num_chips / 3600,
            "host_input": self.host_input
            and {**self.host_input._asdict(), "is_the_limit": self.host_input.is_the_limit},
            "scheduled_times": other and {**other._asdict(), "step": other.step},
            "scheduled_step_seconds": other and other.step,
            "scheduled_mfu": self.scheduled_mfu,
            "scheduled_note": self.scheduled.note,
        }


def plan(config: Config, topology: str, *, schedules: Path | None = None) -> PodPlan:
    """Compile the train step of a configuration for a pod, and compute its memory, work and time.

    `schedules` is the folder given to `compiler.write_schedules`. With it the step is priced by the compiler's own
    schedule, too. If the mesh of the configuration has one device, a mesh is chosen: as many devices along `expert` as
    there are experts, if that fits. Raises ConfigError for a topology or a mesh that does not fit, and if there is no
    TPU compiler.
    """
    pod = find_pod(topology, config.mesh.slice)
    config = on_pod(config, pod)
    placement = place(config.mesh, pod.devices)
    assert placement is not None
    training = prepare(config, placement)
    for path in schedules.iterdir() if schedules else ():
        path.unlink()  # of another plan
    began = time.monotonic()
    try:
        compiled = lower(training, config, placement).compile()
    except jax.errors.JaxRuntimeError as error:
        return _too_large(config, pod, str(error), time.monotonic() - began)
    seconds = time.monotonic() - began
    texts = None if schedules is None else read_schedules(schedules)
    return _account(config, pod, placement, training, compiled, seconds, texts)


def on_pod(config: Config, pod: Pod) -> Config:
    """Complete a configuration for a pod: bfloat16 unless another dtype is set, and a mesh of all devices."""
    count = len(pod.devices)
    if config.model.compute_dtype == "auto":
        config = replace(config, model=replace(config.model, compute_dtype="bfloat16"))
    mesh = config.mesh
    if mesh.data == mesh.expert == 1:
        within = count // mesh.slice
        experts = config.model.num_experts if config.model.moe_layers else 1
        expert = max(n for n in range(1, within + 1) if within % n == 0 and experts % n == 0)
        return replace(config, mesh=replace(mesh, data=within // expert, expert=expert))
    if mesh.num_devices != count:
        raise ConfigError(
            f"mesh.slice={mesh.slice} x mesh.data={mesh.data} x mesh.expert={mesh.expert} = {mesh.num_devices} does "
            f"not use the {count} devices of {pod.name}; set them so, or leave them out to have them chosen"
        )
    return config


def lower(training: Training, config: Config, placement: Placement) -> jax.stages.Lowered:
    """Lower the train step for TPUs, from shapes alone."""
    model, batch = config.model, config.train.batch_size
    images = jax.ShapeDtypeStruct((batch, model.image_size, model.image_size, 3), jnp.uint8, sharding=placement.rows)
    text = jax.ShapeDtypeStruct((batch, model.text_length), jnp.int32, sharding=placement.rows)
    counts = jax.ShapeDtypeStruct((placement.size, len(Counts._fields)), jnp.int32, sharding=placement.rows)
    step: Any = compile_step(training, config, placement)
    # Outside of shard_map, too, back ends are then chosen for the pod's chip.
    with jax.set_mesh(placement.mesh):
        return step.trace(training.abstract, images, text, counts).lower(lowering_platforms=("tpu",))


def _account(
    config: Config,
    pod: Pod,
    placement: Placement,
    training: Training,
    compiled: jax.stages.Compiled,
    seconds: float,
    texts: dict[str, str] | None,
) -> PodPlan:
    """Make the plan of a compiled step; `texts` are the final bundles by instruction, if the schedule was asked for."""
    program = Program(compiled.as_text() or "")
    costs = [(run, _cost(program, run, pod, placement)) for run in program.runs()]
    times = schedule(costs)
    volumes, counts = _exchanges(program, placement)
    memory = _memory(config, placement, training, compiled)
    model_flops = describe(config).flops_per_example * config.train.batch_size
    peak = pod.chip.flops * len(pod.devices)
    return PodPlan(
        **_facts(config, pod),
        fits=sum(memory) <= pod.chip.hbm_bytes,
        memory=memory,
        memory_per_chip_bytes=sum(memory),
        flops_per_step=sum(cost.flops * run.trips for run, cost in costs),
        model_flops_per_step=model_flops,
        collective_bytes=volumes,
        num_collectives=counts,
        times=times,
        modelled_step_seconds=times.step,
        modelled_mfu=model_flops / peak / times.step,
        compile_seconds=seconds,
        scheduled=NOT_ASKED if texts is None else schedule_step(texts, costs, pod.chip),
    )


def _facts(config: Config, pod: Pod) -> dict[str, Any]:
    mesh = config.mesh
    return {
        "preset": config.preset,
        "topology": pod.name,
        "num_devices": len(pod.devices),
        "num_chips": pod.num_chips,
        "num_hosts": len({device.process_index for device in pod.devices}),
        "mesh": {"slice": mesh.slice, "data": mesh.data, "expert": mesh.expert},
        "settings": {
            "model.remat": config.model.remat,
            "mesh.fully_sharded": mesh.fully_sharded,
            "mesh.exchange_chunks": mesh.exchange_chunks,
            "mesh.keep_exchanged": mesh.keep_exchanged,
            "train.accumulation": config.train.accumulation,
        },
        "batch_size": config.train.batch_size,
        "steps": config.train.steps,
        "hbm_bytes": pod.chip.hbm_bytes,
    }


def _too_large(config: Config, pod: Pod, message: str, seconds: float) -> PodPlan:
    """Make the plan of a program that the compiler refused because it does not fit. Other errors are raised."""
    # The second form is that of programs whose temporaries alone are too large.
    used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])(?: of [\d.]+[KMGT] hbm|\) exceeds)", message)
    if used is None:
        raise ConfigError(f"the TPU compiler refused the step for {pod.name}: {message}")
    return PodPlan(
        **_facts(config, pod),
        fits=False,
        memory_per_chip_bytes=int(float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1)),
        model_flops_per_step=describe(config).flops_per_example * config.train.batch_size,
        compile_seconds=seconds,
    )


def _exchanges(program: Program, placement: Placement) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Add up the bytes and the numbers of exchanges, by kind and mesh axes."""
    shape = dict(placement.mesh.shape)
    volumes: dict[str, dict[str, int]] = defaultdict(Counter)
    counts: dict[str, dict[str, int]] = defaultdict(Counter)
    for run in program.runs():
        for collective in collectives(program, run.instruction, run.computation):
            axes = axes_of(_groups(collective, placement), shape)
            volumes[collective.kind][axes] += collective.bytes * run.trips
            counts[collective.kind][axes] += run.trips
    return volumes, counts


def _cost(program: Program, run: Run, pod: Pod, placement: Placement) -> Cost:
    """Compute what one run of an instruction costs by the roofline."""
    chip, here = pod.chip, (program, run.instruction, run.computation)
    products, in_kernels, exchanges = matmuls(*here), kernels(*here), collectives(*here)
    spent = sum(product.on_array(chip.depth) * product.passes for product in products)
    spent += sum(kernel.flops * kernel.passes for kernel in in_kernels)
    alone = exchanges and run.instruction.opcode != "fusion"
    return Cost(
        compute=at_peak(spent, chip),
        hbm=0.0 if alone else through_memory(program.traffic(run), chip),
        exchange=math.fsum(
            exchange_seconds(one.kind, one.bytes, _groups(one, placement)[0], pod, placement.mesh) for one in exchanges
        ),
        flops=sum(one.flops for one in (*products, *in_kernels)),
    )


def _groups(exchange: Collective, placement: Placement) -> tuple[tuple[int, ...], ...]:
    """List the groups of an exchange. Between slices, devices at the same place of each slice form a group."""
    if exchange.groups:
        return exchange.groups
    numbers = np.arange(placement.size).reshape(placement.config.slice, -1).T
    return tuple(map(tuple, numbers.tolist()))


def _memory(config: Config, placement: Placement, training: Training, compiled: jax.stages.Compiled) -> Memory:
    stats: Any = compiled.memory_analysis()
    parameters = _bytes_of(training.abstract.parameters)
    optimizer = _bytes_of(training.abstract.optimizer)
    everything = (
        stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    )
    model = config.model
    pair = model.image_size**2 * 3 + 4 * model.text_length
    batch = config.train.batch_size // placement.size * pair
    rest = everything - parameters - optimizer - batch
    activations = min(kept_for_backward(config, training, placement), rest)
    return Memory(parameters, optimizer, batch, activations, rest - activations, stats.generated_code_size_in_bytes)


def _bytes_of(tree: Any) -> int:
    """Compute the bytes of one device's part of a tree."""
    return sum(_share(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _share(leaf: Any) -> int:
    """Compute how many numbers of an array one device holds."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def kept_for_backward(config: Config, training: Training, placement: Placement) -> int:
    """Compute the bytes of one device that the forward pass keeps for the backward pass, by JAX's own account.

    Arrays that grow with the batch are split like the batch. A copy of a parameter in another dtype is split like the
    parameter. All others are on every device. The compiler may keep less (it recomputes what is cheap), never more.
    """
    chunk, parameters = config.train.chunk_size, jax.tree.leaves(training.abstract.parameters)
    shares = {leaf.shape: _share(leaf) for leaf in parameters}
    own = Counter((leaf.shape, leaf.dtype) for leaf in parameters)
    total = 0
    kept, of_twice = (_residuals(config, training, placement, pairs) for pairs in (chunk, 2 * chunk))
    for leaf, larger in zip(kept, of_twice, strict=True):
        if own[leaf.shape, leaf.dtype] > 0:  # a parameter itself
            own[leaf.shape, leaf.dtype] -= 1
        elif not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            size = math.prod(leaf.shape)
            held = shares.get(leaf.shape, size) if leaf.shape == larger.shape else size // placement.size
            total += held * leaf.dtype.itemsize
    return total


def _residuals(config: Config, training: Training, placement: Placement, pairs: int) -> list[jax.ShapeDtypeStruct]:
    """List what the forward pass over `pairs` pairs hands to the backward pass."""
    model = config.model
    images = jax.ShapeDtypeStruct((pairs, model.image_size, model.image_size, 3), jnp.uint8)
    text = jax.ShapeDtypeStruct((pairs, model.text_length), jnp.int32)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), training.abstract.parameters)

    def residuals(parameters: Any, images: jax.Array, text: jax.Array) -> Any:
        def encode(parameters: Any) -> Any:
            key = step_key(config.train.seed, jnp.int32(0))
            stride = config.num_groups // placement.size if model.moe_layers else 0
            return nnx.merge(training.graph, parameters)(
                scale_images(images), text, RoutingContext(key, jnp.int32(0), stride)
            )

        return jax.tree.leaves(jax.vjp(encode, parameters)[1])

    with jax.set_mesh(placement.mesh):
        return jax.eval_shape(residuals, shapes, images, text)
