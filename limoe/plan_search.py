"""The best mesh, rematerialisation and chunking for a pod, each candidate compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from limoe.config import Config, ConfigError
from limoe.planner import Plan, on_pod, plan
from limoe.pods import find_pod

_REMATS = ("none", "attention", "blocks")
_CHUNKS = (1, 2, 4)


def search(
    config: Config, topology: str, *, say: Callable[[str], None], planned: Callable[[Config, str], Plan] = plan
) -> Plan:
    """The plan with the shortest modelled step among those that fit; without any, the one that needs least memory.

    One kind of setting after another, each from the best so far: rematerialisation first (it decides what fits), then
    the size of the expert axis (1 included), then the number of chunks of an exchange.
    """
    pod = find_pod(topology, config.mesh.slice)
    best = planned(on_pod(config, pod), topology)
    say(_line(best))
    best_config = on_pod(config, pod)
    for candidates in (_remats, _meshes, _chunks):
        for candidate in candidates(best_config, len(pod.devices)):
            found = planned(candidate, topology)
            say(_line(found))
            if _rank(found) < _rank(best):
                best, best_config = found, candidate
    return best


def _remats(config: Config, num_devices: int) -> Iterator[Config]:
    for remat in _REMATS:
        if remat != config.model.remat:
            yield replace(config, model=replace(config.model, remat=remat))


def _meshes(config: Config, num_devices: int) -> Iterator[Config]:
    """Every other size of the expert axis that divides experts and devices, and copies instead of parts where what is
    not an expert is split."""
    mesh = config.mesh
    within = num_devices // mesh.slice
    for expert in range(1, config.model.num_experts + 1 if config.model.moe_layers else 1):
        if within % expert or config.model.num_experts % expert or expert == mesh.expert:
            continue
        try:
            yield replace(config, mesh=replace(mesh, expert=expert, data=within // expert))
        except ConfigError:
            continue


def _chunks(config: Config, num_devices: int) -> Iterator[Config]:
    if config.mesh.expert > 1:
        for chunks in _CHUNKS:
            if chunks != config.mesh.exchange_chunks:
                yield replace(config, mesh=replace(config.mesh, exchange_chunks=chunks))


def _rank(found: Plan) -> tuple[bool, float]:
    """Smaller is better: what fits by time, what does not by memory."""
    if found.fits and found.modelled_step_seconds is not None:
        return (False, found.modelled_step_seconds)
    return (True, float(found.memory_per_chip_bytes))


def _line(found: Plan) -> str:
    seconds = found.modelled_step_seconds
    result = f"{seconds * 1e3:,.1f} ms modelled" if found.fits and seconds else "does not fit"
    mesh = " x ".join(str(size) for size in found.mesh.values())
    remat, chunks = found.settings["model.remat"], found.settings["mesh.exchange_chunks"]
    return (
        f"mesh {mesh}, remat {remat}, {chunks} chunks: {result}, "
        f"{found.memory_per_chip_bytes / 2**30:.1f} GiB (compiled in {found.compile_seconds:.0f} s)"
    )
