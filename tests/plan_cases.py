"""Plans for tests: one that nobody compiled, and the settings of models that compile in seconds."""

from pod_cases import paper_pod

from limoe.config.schema import Config
from limoe.plan.overlap import Times
from limoe.plan.planner import Memory, PodPlan

# Blocks of the B pattern, small, and on as many devices as a host has; float32 would be another kernel.
SMALL = ("depth=4", "moe_layers=1,3", "width=128", "mlp_width=256", "batch_size=16", "group_examples=1")


def made_up(config: Config, seconds: float | None, memory: int) -> PodPlan:
    pod = paper_pod("v5p", 2, 2, 1)
    mesh = config.mesh
    return PodPlan(
        preset=config.preset,
        topology=pod.name,
        num_devices=4,
        num_chips=4,
        mesh={"slice": 1, "data": mesh.data, "expert": mesh.expert},
        settings={"model.remat": config.model.remat, "mesh.exchange_chunks": mesh.exchange_chunks},
        batch_size=config.train.batch_size,
        steps=config.train.steps,
        fits=memory <= pod.chip.hbm_bytes,
        memory=Memory(1, 2, 3, 4, 5, 6) if seconds else None,
        memory_per_chip_bytes=memory,
        hbm_bytes=pod.chip.hbm_bytes,
        flops_per_step=10**12,
        model_flops_per_step=4 * 10**12,
        collective_bytes={"all-to-all": {"expert": 10**6}},
        num_collectives={"all-to-all": {"expert": 5}},
        times=Times(seconds, seconds / 2, seconds, 0.0, 0.0) if seconds else None,
        modelled_step_seconds=seconds,
        modelled_mfu=0.5 if seconds else None,
        compile_seconds=2.0,
    )
