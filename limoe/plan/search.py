"""Search the best mesh, rematerialisation and chunking for a pod. Each candidate is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from limoe.config.schema import Config, ConfigError
from limoe.plan.hlo import HloError
from limoe.plan.planner import PodPlan, on_pod, plan
from limoe.plan.pods import find_pod

_REMATS = ("none", "attention", "blocks")
_CHUNKS = (1, 2, 4)

_Change = tuple[str, dict[str, Any]]
"""A section of the configuration, and values for some of its settings."""


def search(
    config: Config, topology: str, *, say: Callable[[str], None], planned: Callable[[Config, str], PodPlan] = plan
) -> PodPlan:
    """Find the plan with the shortest modelled step that fits. If none fits, return the one that needs least memory.

    One kind of setting is varied after another, each time from the best plan so far: rematerialisation first (it
    decides what fits), then the size of the expert axis (1 included), then the chunks of an exchange. A refused
    candidate is skipped with a message. Raises ConfigError or HloError if the first configuration is refused.
    """
    pod = find_pod(topology, config.mesh.slice)
    best_config = on_pod(config, pod)
    best = planned(best_config, topology)
    say(_line(best))
    for changes in (_remats, _meshes, _chunks):
        for section, values in changes(best_config, len(pod.devices)):
            try:
                candidate = replace(best_config, **{section: replace(getattr(best_config, section), **values)})
                found = planned(candidate, topology)
            except (ConfigError, HloError) as error:
                settings = ", ".join(f"{section}.{name}={value}" for name, value in values.items())
                say(f"{settings}: skipped, because {error}")
                continue
            say(_line(found))
            if _rank(found) < _rank(best):
                best, best_config = found, candidate
    return best


def _remats(config: Config, num_devices: int) -> Iterator[_Change]:
    for remat in _REMATS:
        if remat != config.model.remat:
            yield "model", {"remat": remat}


def _meshes(config: Config, num_devices: int) -> Iterator[_Change]:
    """List the other sizes of the expert axis. They divide the number of experts and of devices."""
    mesh = config.mesh
    within = num_devices // mesh.slice
    for expert in range(1, config.model.num_experts + 1 if config.model.moe_layers else 1):
        if within % expert == 0 and config.model.num_experts % expert == 0 and expert != mesh.expert:
            yield "mesh", {"expert": expert, "data": within // expert}


def _chunks(config: Config, num_devices: int) -> Iterator[_Change]:
    if config.mesh.expert > 1:
        for chunks in _CHUNKS:
            if chunks != config.mesh.exchange_chunks:
                yield "mesh", {"exchange_chunks": chunks}


def _rank(found: PodPlan) -> tuple[bool, float]:
    """Rank a plan; smaller is better. Plans that fit go first, by time, then the others by memory."""
    if found.fits and found.modelled_step_seconds is not None:
        return (False, found.modelled_step_seconds)
    return (True, float(found.memory_per_chip_bytes))


def _line(found: PodPlan) -> str:
    seconds = found.modelled_step_seconds
    result = f"{seconds * 1e3:,.1f} ms modelled" if found.fits and seconds else "does not fit"
    mesh = " x ".join(str(size) for size in found.mesh.values())
    remat, chunks = found.settings["model.remat"], found.settings["mesh.exchange_chunks"]
    return (
        f"mesh {mesh}, remat {remat}, {chunks} chunks: {result}, "
        f"{found.memory_per_chip_bytes / 2**30:.1f} GiB (compiled in {found.compile_seconds:.0f} s)"
    )
