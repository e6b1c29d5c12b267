"""Training on a mesh: the same losses, drops and state as on one device, whatever the shape of the mesh."""

import functools
import types
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model_cases import LID, neighbour, small_batch, small_config

from limoe.config.schema import Config, ConfigError, MeshConfig
from limoe.config.settings import override
from limoe.model.build import parameter_kinds
from limoe.parallel.mesh import (
    DATA,
    EXPERT,
    Placement,
    _arranged,
    joined,
    own_rows,
    parameter_spec,
    place,
    with_shardings,
)
from limoe.parallel.parameters import KERNEL, Kind, parameter_path
from limoe.train.step import StepReport, TrainState, compile_step, new_state, prepare
from limoe.workdir.checkpoint import Checkpoints

# Two repeats of (dense, experts) in one scan; sixteen groups of one pair, so that eight devices have two.
BASE = ("depth=4", "moe_layers=1,3", "batch_size=16", "group_examples=1", "width=128", "mlp_width=128")
STEPS = 3
MESHES = {
    "experts": ("mesh.expert=4", "mesh.data=2"),
    "split": ("mesh.data=4", "mesh.expert=2", "mesh.fully_sharded=true", "remat=blocks"),
    "slices": ("mesh.slice=2", "mesh.data=2", "mesh.expert=2", "remat=blocks", "mesh.keep_exchanged=false"),
    "chunks": ("mesh.data=2", "mesh.expert=2", "accumulation=2", "mesh.exchange_chunks=2"),
    "eight": ("mesh.expert=8", "num_experts=8"),
}
# Compiling a step for eight devices takes twenty seconds; these two have every setting of the mesh but slices.
SAMPLE = ("split", "chunks")
eight_devices = pytest.mark.devices(8)


def config_of(*settings: str) -> Config:
    return small_config(*BASE, "optimizer.name=adafactor", "warmup_steps=0", *settings)


class Trained(NamedTuple):
    config: Config
    state: TrainState
    reports: list[StepReport]


class Run:
    """A state and its compiled step."""

    def __init__(self, config: Config):
        self.config = config
        self.placement: Placement | None = place(config.mesh)
        self.training = prepare(config, self.placement)
        self.state = new_state(config, self.training, self.placement)
        self.step = jax.jit(compile_step(self.training, config, self.placement))

    def steps(self, count: int) -> list[StepReport]:
        reports = []
        for _ in range(count):
            batch = (
                *small_batch(self.config, seed=int(self.state.step)),
                np.ones((self.config.mesh.num_devices, 3), np.int32),
            )
            self.state, report = self.step(self.state, *(joined(part, self.placement) for part in batch))
            reports.append(jax.device_get(report))
        return reports


@functools.cache
def trained(*settings: str) -> Trained:
    run = Run(config_of(*settings))
    reports = run.steps(STEPS)
    return Trained(run.config, jax.device_get(run.state), reports)


@functools.cache
def trained_with_rounding(*settings: str) -> list[StepReport]:
    """For each step, how far its losses and its norm lie from those of twins that begin one rounding away.

    Sums over the same numbers in another order round differently, and three updates carry that on; how far they do is
    a property of the function, measured here on one device by moving every parameter to a neighbouring float32.
    """
    expected, run = trained(*settings).reports, Run(config_of(*settings))
    first, moved = run.state, [jax.tree.map(np.zeros_like, report) for report in expected]
    for seed in range(4):
        draw = functools.partial(neighbour, np.random.default_rng(seed))
        run.state = first._replace(parameters=jax.tree.map(draw, first.parameters))
        for step, report in enumerate(run.steps(STEPS)):
            # A near tie that falls the other way would be no rounding.
            np.testing.assert_array_equal(report.routing.kept, expected[step].routing.kept)
            np.testing.assert_array_equal(report.routing.wanted, expected[step].routing.wanted)
            off = jax.tree.map(lambda a, b: np.abs(a - b), report, expected[step])
            moved[step] = jax.tree.map(np.maximum, moved[step], off)
    return moved


def assert_same_training(mine: Trained, *twin: str) -> None:
    expected, moved = trained(*twin).reports, trained_with_rounding(*twin)
    for report, other, rounding in zip(mine.reports, expected, moved, strict=True):
        np.testing.assert_array_equal(report.routing.kept, other.routing.kept)
        np.testing.assert_array_equal(report.routing.wanted, other.routing.wanted)
        assert (report.routing.kept < report.routing.wanted).any()
        for a, b, off in zip(
            *(jax.tree.leaves((r.loss, r.gradient_norm)) for r in (report, other, rounding)), strict=True
        ):
            # Eight of them: a sum rounds in many places, a twin was moved in one. And a lid on what was measured.
            assert (off <= LID * np.abs(b)).all(), (off, b)
            np.testing.assert_allclose(a, b, rtol=8 * 2.0**-23, atol=8 * off)
    assert int(mine.state.step) == STEPS


@eight_devices
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.full) for name in MESHES]
)
def test_the_loss_curve_is_that_of_one_device(name):
    settings = MESHES[name]
    assert_same_training(trained(*settings), *(text for text in settings if text.startswith("num_experts")))


@eight_devices
@pytest.mark.parametrize("name", ["experts", "split", "slices"])
def test_each_device_holds_its_part(name):
    config = config_of(*MESHES[name])
    placement = place(config.mesh)
    assert placement is not None
    training = prepare(config, placement)
    kinds = parameter_kinds(training.graph, training.abstract.parameters)
    experts = tuple(name for name, kind in kinds.items() if kind.per_expert)
    assert {name.rpartition("/")[2] for name in experts} == {"w1", "b1", "w2", "b2"}
    seen = {"experts": 0, "split": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(training.abstract):
        full, spec = parameter_path(path), leaf.sharding.spec
        if full.removesuffix("/row").removesuffix("/column").endswith(experts):
            # Stacked by the scan, so experts are the second axis, also of a factored moment.
            assert tuple(spec)[:2] == (None, EXPERT) and not set(spec[2:]) - {None}, full
            seen["experts"] += 1
        elif config.mesh.fully_sharded and leaf.size >= 2**15:
            assert DATA in spec, full
            seen["split"] += 1
        elif not config.mesh.fully_sharded:
            assert not set(spec) - {None}, full
    # w1 and w2 with their momentum and two factors each, b1 and b2 with momentum and moment.
    assert seen["experts"] == 2 * 4 + 2 * 3
    assert bool(seen["split"]) == config.mesh.fully_sharded


# 2 x 4, then 1 x 4, then 4 x 2, the last of them with parameters split.
SHAPES = [
    ("mesh.data=2", "mesh.expert=4"),
    ("mesh.data=1", "mesh.expert=4"),
    ("mesh.data=4", "mesh.expert=2", "mesh.fully_sharded=true"),
]


def restored_on(folder, config: Config, step: int) -> TrainState:
    """The newest checkpoint, each leaf where this configuration has it."""
    abstract = prepare(config, place(config.mesh)).abstract
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(abstract)
    assert restored is not None and restored.step == step
    for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding
    return restored.state


@eight_devices
def test_a_checkpoint_is_restored_on_another_mesh(tmp_path):
    first = config_of(*SHAPES[0])
    placement = place(first.mesh)
    state = new_state(first, prepare(first, placement), placement)
    expected = jax.device_get(state)
    for number, shape in enumerate(SHAPES):
        if number:
            state = restored_on(tmp_path, config_of(*shape), number)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(number + 1, state)


@eight_devices
@pytest.mark.full
def test_training_goes_on_from_mesh_to_mesh(tmp_path):
    reports = []
    for number, shape in enumerate(SHAPES):
        run = Run(config_of(*shape))
        if number:
            run.state = restored_on(tmp_path, run.config, number)
        reports += run.steps(1)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(number + 1, run.state)
    assert_same_training(Trained(run.config, jax.device_get(run.state), reports))


def placed(*devices: Any) -> Placement:
    """As many devices as given along `data`, of which only the process matters."""
    mesh = mock.Mock(spec=jax.sharding.Mesh, devices=np.array(devices, object).reshape(1, -1, 1), size=len(devices))
    return Placement(mesh, MeshConfig(data=len(devices)))


def test_rows_of_a_process_are_those_of_its_devices(monkeypatch):
    """Two processes whose devices lie in turn along the mesh, as on a torus."""
    placement = placed(*(types.SimpleNamespace(process_index=index) for index in (0, 1, 0, 1)))
    own = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        own.append(own_rows(8, placement))
    assert own == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(("slices", "expected"), [((0, 1, 0, 1), [[0, 2], [1, 3]]), ((0, 1, 2, 3), [[0, 1], [2, 3]])])
def test_slices_of_a_mesh_are_slices_of_devices_where_there_are_as_many(slices, expected):
    """Where not, the devices stay in their order: nothing is refused that could be run."""
    facts = [
        types.SimpleNamespace(id=number, slice_index=index, process_index=0, platform="gpu", device_kind="NVIDIA")
        for number, index in enumerate(slices)
    ]
    arranged = _arranged(sorted(facts, key=lambda device: device.slice_index), 4, (2, 1, 2))
    assert [[device.id for device in row.flat] for row in arranged] == expected


@eight_devices
def test_a_mesh_that_needs_more_devices_than_there_are():
    with pytest.raises(ConfigError, match=r"mesh\.data=4 x mesh\.expert=4 needs 16 devices, but there are 8"):
        place(MeshConfig(data=4, expert=4))


REFUSED = [
    (("mesh.expert=3", "batch_size=12"), r"mesh\.expert=3 .* model\.num_experts=4 .* use one of 1, 2, 4"),
    (("mesh.data=3",), r"= 3 devices cannot share 16 pairs"),
    (("mesh.data=8", "group_examples=4"), r"does not divide the chunk of 2 examples .* / 8 devices"),
    (("mesh.data=2", "group_examples=0"), r"a mesh of 2 devices would cut the one routing group"),
    (("mesh.data=0",), r"mesh\.data=0: must be positive"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_mesh_that_does_not_fit_the_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        override(config_of(), list(settings))


def test_an_axis_that_cannot_be_split_is_left():
    split = MeshConfig(data=4, fully_sharded=True)
    for shape, expected in [((30, 4096), P(None, DATA)), ((4096, 30), P(DATA)), ((30, 4097), P()), ((64, 64), P())]:
        assert parameter_spec(KERNEL, shape, split) == expected
    assert parameter_spec(Kind("kernel", stacked=True), (3, 256, 512), split) == P(None, None, DATA)


def test_an_array_of_the_state_without_a_parameter_is_refused():
    placement = Placement(jax.make_mesh((1, 1, 1), ("slice", DATA, EXPERT)), MeshConfig())
    state: dict[str, Any] = {"parameters": {"kernel": jnp.ones((2, 2))}, "stray": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"stray .* belongs to no parameter"):
        with_shardings(state, {"kernel": jnp.ones((2, 2))}, {"kernel": KERNEL}, placement)
