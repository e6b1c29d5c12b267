"""`limoe plan`: pods that exist or do not, the model of exchanges, the search, the command; nothing is compiled."""

import dataclasses
import json
import re
from collections.abc import Callable

import numpy as np
import pytest
from jax.sharding import Mesh
from model_cases import small_config
from plan_cases import SMALL, made_up
from pod_cases import paper_pod

from limoe.cli import main
from limoe.config.presets import preset
from limoe.config.schema import Config, ConfigError
from limoe.config.settings import override
from limoe.parallel.mesh import AXES, place
from limoe.plan import compiler
from limoe.plan.hlo import HloError
from limoe.plan.overlap import Times
from limoe.plan.planner import Memory, PodPlan, _too_large, kept_for_backward, on_pod
from limoe.plan.pods import Pod, find_pod, topologies
from limoe.plan.prices import DATACENTRE_BANDWIDTH, LATENCY, exchange_seconds
from limoe.plan.scheduled import ScheduledStep
from limoe.plan.search import search
from limoe.plan.text import as_text
from limoe.train.step import prepare


def test_pods_that_do_not_exist():
    with pytest.raises(ConfigError, match=r"v9:2x2 is no TPU pod; kinds are v4, v5e, v5p, v6e, tpu7x"):
        find_pod("v9:2x2")
    with pytest.raises(ConfigError, match=r"v6e:3x3 does not exist; v6e has v6e:2x2, v6e:2x4, .*, v6e:16x16$"):
        find_pod("v6e:3x3")
    assert "v5p:8x8x8" in topologies("v5p") and "v5p:16x16x24" in topologies("v5p")


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    from jax.experimental import topologies as compile_only

    def absent(**kwargs):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(compile_only, "get_topology_desc", absent)
    monkeypatch.setattr(compiler, "prepare", lambda: None)
    with pytest.raises(
        ConfigError, match=r"TPU compiler \(libtpu\).*extra aot: pip install '\.\[aot\]'.*not installed"
    ):
        find_pod("v5p:2x2x1")


def test_bad_commands(capsys):
    assert main(["plan", "--preset=b16"]) == 2
    assert "--topology=KIND:SHAPE" in capsys.readouterr().err
    assert main(["plan", "--topology=v5p:5x5x5"]) == 1
    assert "v5p has v5p:2x2x1" in capsys.readouterr().err
    assert main(["train", "--topology=v5p:2x2x1"]) == 2


def test_the_mesh_is_chosen_or_must_fit():
    pod = paper_pod("v5p", 4, 4, 4)
    chosen = on_pod(preset("b16"), pod)
    assert (chosen.mesh.data, chosen.mesh.expert, chosen.model.compute_dtype) == (2, 32, "bfloat16")
    assert on_pod(preset("b16-dense"), pod).mesh.data == 64
    assert on_pod(override(preset("b16"), ["mesh.data=64"]), pod).mesh.expert == 1
    with pytest.raises(ConfigError, match=r"= 8 does not use the 64 devices of v5p:4x4x4"):
        on_pod(override(preset("b16"), ["mesh.expert=8"]), pod)


def exchange(kind: str, size: int, pod: Pod, group: int) -> float:
    mesh = Mesh(np.array(pod.devices).reshape(1, -1, group), AXES)
    return exchange_seconds(kind, size, tuple(range(group)), pod, mesh) - LATENCY


def test_exchanges_take_what_the_narrowest_cut_allows():
    pod, size = paper_pod("v5p", 8, 8, 8), 90_000_000
    # 32 chips are 8 x 4 x 1: a closed ring of 8 moves size * 8 / (4 * 2 links), a line of 4 the same.
    assert exchange("all-to-all", size, pod, 32) == pytest.approx(size / 90e9)
    # 512 chips: rings of 8 in three dimensions, two links each.
    assert exchange("all-gather", size, pod, 512) == pytest.approx(511 / 512 * size / (6 * 90e9))
    assert exchange("all-reduce", size, pod, 512) == pytest.approx(2 * exchange("all-gather", size, pod, 512), rel=0.01)
    # A side of 8 of 16 chips is a line.
    flat = paper_pod("v6e", 16, 16)
    assert exchange("all-to-all", size, flat, 32) == pytest.approx(size * 16 / (4 * 2 * 90e9))
    assert exchange_seconds("all-to-all", 0, (0, 1), flat, Mesh(np.array(flat.devices).reshape(1, 8, 32), AXES)) == 0


def between_slices(kind: str, size: int, pod: Pod, *, per_slice: int) -> float:
    """Over two slices, of each of which a group has so many neighbouring devices."""
    devices = [dataclasses.replace(device, slice_index=n) for n in range(2) for device in pod.devices]
    mesh = Mesh(np.array(devices).reshape(2, 1, -1), AXES)
    own = len(pod.devices)
    group = tuple(n * own + place for n in range(2) for place in range(per_slice))
    return exchange_seconds(kind, size, group, pod, mesh) - LATENCY


def test_exchanges_between_slices_ship_each_devices_share():
    pod, size = paper_pod("v5p", 2, 2, 1), 10**9
    # Half of the buffer belongs to the other slice.
    half = size / 2 / DATACENTRE_BANDWIDTH
    assert between_slices("all-gather", size, pod, per_slice=4) == pytest.approx(half / 4)
    assert between_slices("reduce-scatter", size, pod, per_slice=4) == pytest.approx(half / 4)
    assert between_slices("all-reduce", size, pod, per_slice=4) == pytest.approx(2 * half / 4)
    # One chip of each slice has nobody to share with, and nothing to do inside.
    assert between_slices("all-gather", size, pod, per_slice=1) == pytest.approx(half)
    # Rows for another slice have one way only; a permutation may move everything.
    assert between_slices("all-to-all", size, pod, per_slice=4) == pytest.approx(half)
    assert between_slices("collective-permute", size, pod, per_slice=1) == pytest.approx(2 * half)
    # Two devices share a chip's part of the network.
    halves = paper_pod("tpu7x", 2, 2, 1)
    assert between_slices("all-gather", size, halves, per_slice=1) == pytest.approx(2 * half)


def test_the_slower_of_both_levels_counts():
    # 64 chips share the network, so that the rings of four in three dimensions take longer.
    pod, size = paper_pod("v5p", 4, 4, 4), 10**9
    assert between_slices("all-gather", size, pod, per_slice=64) == pytest.approx(63 / 64 * size / (6 * 90e9))
    slow = pod._replace(chip=dataclasses.replace(pod.chip, link_bandwidth=900e9))
    network = size / 2 / 64 / DATACENTRE_BANDWIDTH
    assert between_slices("all-gather", size, slow, per_slice=64) == pytest.approx(network)


def test_the_search_finds_the_fastest_that_fits(monkeypatch):
    monkeypatch.setattr("limoe.plan.search.find_pod", lambda name, slices: paper_pod("v5p", 2, 2, 1))
    seen, said = [], []

    def planned(config: Config, topology: str) -> PodPlan:
        key = (config.model.remat, config.mesh.expert, config.mesh.exchange_chunks)
        seen.append(key)
        seconds = {"none": 1.0, "attention": 2.0, "blocks": 3.0}[key[0]] - 0.1 * key[2] + 0.2 * (key[1] - 2) ** 2
        return made_up(config, seconds, 200 * 2**30 if key[0] == "none" else 2**30)

    config = small_config("batch_size=16", "group_examples=1")
    best = search(config, "v5p:2x2x1", say=said.append, planned=planned)
    assert (best.settings["model.remat"], best.mesh["expert"], best.settings["mesh.exchange_chunks"]) == (
        *("attention", 2),
        4,
    )
    assert {expert for _, expert, _ in seen} == {1, 2, 4} and len(said) == len(seen) == len(set(seen))
    assert "does not fit" in said[0] and "modelled" in said[-1]


@pytest.mark.parametrize("refusal", [ConfigError("too many of them"), HloError("a loop of another form")])
def test_the_search_goes_on_where_a_candidate_is_refused(monkeypatch, refusal):
    monkeypatch.setattr("limoe.plan.search.find_pod", lambda name, slices: paper_pod("v5p", 2, 2, 1))
    said = []

    def planned(config: Config, topology: str) -> PodPlan:
        if config.mesh.expert == 2 or config.mesh.exchange_chunks == 4:
            raise refusal
        return made_up(config, 1.0 / config.mesh.exchange_chunks, 2**30)

    config = small_config("batch_size=16", "group_examples=1")
    best = search(config, "v5p:2x2x1", say=said.append, planned=planned)
    assert best.settings["mesh.exchange_chunks"] == 2
    assert [line for line in said if "skipped" in line] == [
        f"mesh.expert=2, mesh.data=2: skipped, because {refusal}",
        f"mesh.exchange_chunks=4: skipped, because {refusal}",
    ]
    with pytest.raises(type(refusal), match=str(refusal)):
        search(override(config, ["mesh.expert=2", "mesh.data=2"]), "v5p:2x2x1", say=said.append, planned=planned)


def test_the_search_among_what_does_not_fit(monkeypatch):
    monkeypatch.setattr("limoe.plan.search.find_pod", lambda name, slices: paper_pod("v5p", 2, 2, 1))
    planned = lambda config, _: made_up(config, None, (200 - 50 * (config.model.remat == "blocks")) * 2**30)  # noqa: E731
    best = search(small_config("batch_size=16", "group_examples=1"), "v5p:2x2x1", say=lambda _: None, planned=planned)
    assert best.settings["model.remat"] == "blocks" and not best.fits
    assert "DOES NOT FIT" in as_text(best) and "model.remat=blocks" in as_text(best)


# What `limoe plan --json` prints.
KEYS = {
    *("preset", "topology", "num_devices", "num_chips", "mesh", "settings", "batch_size", "steps", "fits", "memory"),
    *("memory_per_chip_bytes", "hbm_bytes", "flops_per_step", "model_flops_per_step", "collective_bytes"),
    *("num_collectives", "modelled_times", "modelled_step_seconds", "modelled_mfu", "modelled_pairs_per_second"),
    *("modelled_days", "modelled_chip_hours", "compile_seconds"),
    *("num_hosts", "host_input"),
    *("scheduled_times", "scheduled_step_seconds", "scheduled_mfu", "scheduled_note"),
}


def rows(text: str) -> dict[str, str]:
    """The lines `name   value` of a plan for a terminal; of two values with a blank between them."""
    pairs = [re.split("  +", line.strip(), maxsplit=1) for line in text.splitlines() if "   " in line.strip()]
    return {name: re.sub("  +", " ", value) for name, value in pairs}


def test_a_plan_in_numbers_and_in_words():
    found = dataclasses.replace(
        made_up(small_config(), 0.25, 21 * 2**30),
        memory=Memory(*(n * 2**30 for n in range(1, 7))),
        times=Times(compute=0.11, hbm=0.12, busy=0.2, exchange=0.09, hidden=0.04),
        scheduled=ScheduledStep(Times(0.31, 0.13, busy=0.44, exchange=0.09, hidden=0.03), "2 of 9 instructions"),
        num_devices=8,
        batch_size=4096,
        steps=691_200,
        num_hosts=2,
    )
    fields = json.loads(json.dumps(found.as_json()))
    assert set(fields) == KEYS
    # 691,200 steps of a quarter of a second are 48 hours; a chip may be two devices.
    assert fields["modelled_pairs_per_second"] == 16_384
    assert fields["modelled_days"] == 2 and fields["modelled_chip_hours"] == 4 * 48
    times = {"compute": 0.11, "hbm": 0.12, "busy": 0.2, "exchange": 0.09, "hidden": 0.04}
    assert fields["modelled_times"] == times | {"step": pytest.approx(0.25)}
    assert fields["scheduled_times"]["compute"] == 0.31 and fields["scheduled_note"] == "2 of 9 instructions"
    assert fields["scheduled_step_seconds"] == fields["scheduled_times"]["step"] == pytest.approx(0.5)
    assert fields["scheduled_mfu"] == pytest.approx(0.25)
    text = as_text(found)
    assert "fits, 21.00 GiB of 95.74 GiB" in text and "4 chips (8 devices)" in text
    assert "the schedule: 2 of 9 instructions" in text
    assert "a step, modelled (not measured)" in text and "the run, modelled by the roofline" in text
    memory = {"parameters": 1, "optimizer": 2, "batch": 3, "activations": 4, "temporary": 5, "program": 6}
    step = {
        "computing": (110, 310),
        "main memory": (120, 130),
        "both, one covering the other": (200, 440),
        "exchanges": (90, 90),
        "of them under other work": (40, 30),
        "step": (250, 500),
    }
    assert rows(text) == {
        **{name: f"{size}.00 GiB" for name, size in memory.items()},
        "by the roofline": "by the schedule",
        **{name: f"{one}.000 ms {other}.000 ms" for name, (one, other) in step.items()},
        "FLOPs of matmuls": "1e+12",
        "all-to-all over expert": "1.0 MB in 5",
        "model FLOPs utilisation": "50.0% 25.0%",
        "pairs a second": "16,384",
        "days for 691,200 steps": "2.0",
        "chip-hours": "192",
        "pictures to decode a second": "8,192",
        "to read": "164 MB/s",
        "cores that decode": "9.8",
    }
    assert fields["host_input"]["pictures_per_second"] == 8_192 and "input of a host, 2 in all" in text
    # The lock is held 0.28 ms a picture.
    assert fields["host_input"]["is_the_limit"] and "THE INPUT WOULD BE THE LIMIT" in text
    assert "the input need not be the limit" in as_text(dataclasses.replace(found, num_hosts=5))


@pytest.mark.parametrize("flags", [(), ("--json",), ("--search",), ("--search", "--json")])
def test_the_command_plans_what_it_was_told(monkeypatch, capsys, flags):
    asked = []

    def planned(config: Config, topology: str) -> PodPlan:
        asked.append(("plan", config, topology))
        return made_up(config, 0.25, 2**30)

    def searched(config: Config, topology: str, *, say: Callable[[str], None], planned: object) -> PodPlan:
        asked.append(("search", config, topology))
        say("a candidate")
        return made_up(config, 0.25, 2**30)

    monkeypatch.setattr("limoe.plan.planner.plan", planned)
    monkeypatch.setattr("limoe.plan.search.search", searched)
    assert main(["plan", "--preset=h14", "--topology=v5p:8x8x8", "--batch=43008", *flags]) == 0
    (by, config, topology), *others = asked
    assert (by, topology, others) == ("search" if "--search" in flags else "plan", "v5p:8x8x8", [])
    assert config == override(preset("h14"), ["train.batch_size=43008"])
    out, err = capsys.readouterr()
    assert ("a candidate" in err) == ("--search" in flags)
    if "--json" in flags:
        fields = json.loads(out)
        assert set(fields) == KEYS and (fields["preset"], fields["batch_size"]) == ("h14", 43_008)
        assert fields["modelled_pairs_per_second"] == 4 * 43_008
    else:
        assert out == as_text(made_up(config, 0.25, 2**30)) + "\n" and "43,008 pairs a step" in out


def kept(*settings: str) -> int:
    config = small_config(*SMALL, "compute_dtype=bfloat16", *settings)
    placement = place(config.mesh)
    assert placement is not None
    return kept_for_backward(config, prepare(config, placement), placement)


@pytest.mark.devices(4)
def test_what_is_kept_is_split_where_it_carries_the_batch():
    # With a part that halves on twice the devices and one that does not, k2 = v/2 + f and k4 = v/4 + f.
    on_every_device = 2 * kept("mesh.data=4") - kept("mesh.data=2")
    # Attention of four blocks, two dense MLPs, a projection for each modality: copies in bfloat16.
    copies = 2 * (4 * 4 * 128 * 128 + 2 * 2 * 128 * 256 + 2 * 128 * 128)
    # The rest are gains of norms and numbers of groups.
    assert copies <= on_every_device < 1.01 * copies


def test_what_the_compiler_refused_is_not_known_rather_than_nothing():
    pod, config = paper_pod("v5e", 2, 2), small_config("batch_size=16", "group_examples=1")
    message = "Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded hbm capacity by 5.75G."
    fields = json.loads(json.dumps(_too_large(config, pod, message, 3.0).as_json()))
    assert fields["memory_per_chip_bytes"] == 21.5 * 2**30 and fields["fits"] is False
    unknown = {name for name, value in fields.items() if value is None}
    assert unknown == {
        *("memory", "flops_per_step", "collective_bytes", "num_collectives", "modelled_times"),
        *("modelled_step_seconds", "modelled_mfu", "modelled_pairs_per_second", "modelled_days", "modelled_chip_hours"),
        "host_input",
        *("scheduled_times", "scheduled_step_seconds", "scheduled_mfu"),
    }
    with pytest.raises(ConfigError, match="the TPU compiler refused the step for v5e:2x2: another reason"):
        _too_large(config, pod, "another reason", 3.0)
