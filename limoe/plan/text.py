"""Print a plan in a terminal."""

from __future__ import annotations

from limoe.plan.host_input import CORE_SECONDS, PICTURE_BYTES
from limoe.plan.planner import SECONDS_OF_A_DAY, PodPlan

_GIB = 2**30


def as_text(plan: PodPlan) -> str:
    """Write a plan in words and numbers. Modelled times say so."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    settings = ", ".join(f"{name}={str(value).lower()}" for name, value in plan.settings.items())
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"{plan.preset} on {plan.topology}: {plan.num_chips:,} chips ({plan.num_devices:,} devices), mesh {mesh}, "
        f"{plan.batch_size:,} pairs a step",
        f"  {settings}",
        f"  compiled in {plan.compile_seconds:.0f} s; nothing ran",
        "",
        f"memory of a device: {verdict}, {_gib(plan.memory_per_chip_bytes)} of {_gib(plan.hbm_bytes)}",
    ]
    if plan.memory is not None:
        lines += [_row(name, _gib(size)) for name, size in plan.memory._asdict().items()]
    else:
        lines.append("  the compiler gave up; try --set model.remat=blocks, mesh.fully_sharded=true or more chips")
    if plan.times is None or plan.modelled_mfu is None or plan.collective_bytes is None or plan.num_collectives is None:
        return "\n".join(lines)
    lines += ["", "work of a device and step, trips of loops counted"]
    lines.append(_row("FLOPs of matmuls", f"{plan.flops_per_step:.4g}"))
    for kind, by_axes in plan.collective_bytes.items():
        for axes, size in by_axes.items():
            count = plan.num_collectives[kind][axes]
            lines.append(_row(f"{kind} over {axes}", f"{size / 1e6:,.1f} MB in {count:,}"))
    both = [times for times in (plan.times, plan.scheduled.times) if times is not None]
    lines += ["", "a step, modelled (not measured)"]
    if plan.scheduled.times is not None:
        lines.append(_row("", "by the roofline", "by the schedule"))
    for name, field in (
        ("computing", "compute"),
        ("main memory", "hbm"),
        ("both, one covering the other", "busy"),
        ("exchanges", "exchange"),
        ("of them under other work", "hidden"),
        ("step", "step"),
    ):
        lines.append(_row(name, *(f"{getattr(times, field) * 1e3:,.3f} ms" for times in both)))
    shares = [share for share in (plan.modelled_mfu, plan.scheduled_mfu) if share is not None]
    lines.append(_row("model FLOPs utilisation", *(f"{share:.1%}" for share in shares)))
    lines.append(f"  the schedule: {plan.scheduled.note}")
    step = plan.times.step
    lines += [
        "",
        "the run, modelled by the roofline",
        _row("pairs a second", f"{plan.batch_size / step:,.0f}"),
        _row(f"days for {plan.steps:,} steps", f"{plan.steps * step / SECONDS_OF_A_DAY:,.1f}"),
        _row("chip-hours", f"{plan.steps * step / 3600 * plan.num_chips:,.0f}"),
    ]
    return "\n".join(lines + _input(plan))


def _input(plan: PodPlan) -> list[str]:
    found = plan.host_input
    assert found is not None
    limit = (
        "THE INPUT WOULD BE THE LIMIT: store smaller pictures, or use more hosts a chip"
        if found.is_the_limit
        else "so the input need not be the limit"
    )
    return [
        "",
        f"input of a host, {found.num_hosts:,} in all, for that step",
        _row("pictures to decode a second", f"{found.pictures_per_second:,.0f}"),
        _row("to read", f"{found.bytes_per_second / 1e6:,.0f} MB/s"),
        _row("cores that decode", f"{found.cores:,.1f}"),
        f"  for JPEGs of 256 px, {PICTURE_BYTES / 1e3:.0f} kB and {CORE_SECONDS * 1e3:.1f} ms of a core each (measured "
        f"on one CPU); one process ends at about {found.most_per_second:,.0f} a second,",
        f"  {limit}",
    ]


def _row(name: str, *values: str) -> str:
    return f"  {name:<34} " + " ".join(f"{value:>20}" for value in values)


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f} GiB"
