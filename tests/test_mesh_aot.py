"""Where devices of described TPU pods lie in a mesh, and which rows of a batch their processes read."""

import jax
import numpy as np
import pytest

from limoe.config.schema import MeshConfig
from limoe.parallel.mesh import own_rows, place
from limoe.plan.pods import find_pod

pytestmark = pytest.mark.aot

# Pod, mesh, and how far the devices that exchange rows reach along each side of the torus.
LAYOUTS = [
    ("v5p:4x4x4", MeshConfig(data=2, expert=32), (4, 4, 2)),  # splits an axis of the torus
    ("v5p:8x8x8", MeshConfig(data=16, expert=32), (8, 4, 1)),
    (
        "v5e:4x4",
        MeshConfig(data=4, expert=4),
        (4, 1, 1),
    ),  # 2 x 2 in plain order, whose groups along `data` are scattered
    ("tpu7x:4x4x4", MeshConfig(data=4, expert=32), (4, 4, 1)),  # both devices of each chip
    ("v4:4x4x4", MeshConfig(data=4, expert=32), (4, 4, 1)),  # as mesh_utils refuses two devices a chip there
    ("v5p:2x2x1", MeshConfig(slice=2, data=2, expert=2), (2, 1, 1)),
]


@pytest.mark.parametrize(("topology", "mesh", "reach"), LAYOUTS, ids=[case[0] for case in LAYOUTS])
def test_neighbours_on_the_torus_exchange_rows(topology, mesh, reach, monkeypatch):
    devices = find_pod(topology, mesh.slice).devices
    placement = place(mesh, devices)
    assert placement is not None
    assert {device.id for device in placement.mesh.devices.flat} == {device.id for device in devices}
    for number, of_slice in enumerate(placement.mesh.devices):
        assert {getattr(device, "slice_index", 0) for device in of_slice.flat} == {number}
        for group in of_slice:
            places = np.array([device.coords for device in group])
            assert tuple(np.ptp(places, axis=0) + 1) == reach
    # Every row is read once, by the process whose device holds it.
    batch, read = 2 * len(devices), []
    for process in {device.process_index for device in devices}:
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        rows = own_rows(batch, placement)
        assert {placement.mesh.devices.flat[row // 2].process_index for row in rows} == {process}
        read += rows
    assert sorted(read) == list(range(batch))
