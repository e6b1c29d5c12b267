"""A plan for a terminal."""

from __future__ import annotations

from limoe.plan.planner import SECONDS_OF_A_DAY, PodPlan

_GIB = 2**30


def as_text(plan: PodPlan) -> str:
    """All of a plan in words and numbers; every time says that it is modelled."""
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
    times = plan.times
    lines += ["", "a step, modelled (not measured)"]
    for name, value in (
        ("matmuls", times.compute),
        ("main memory", times.hbm),
        ("both, one covering the other", times.busy),
        ("exchanges", times.exchange),
        ("of them under other work", times.hidden),
        ("step", times.step),
    ):
        lines.append(_row(name, f"{value * 1e3:,.1f} ms"))
    scheduled = plan.scheduled_step_seconds
    lines.append(
        _row("step by the compiler's schedule", "unknown" if scheduled is None else f"{scheduled * 1e3:,.1f} ms")
    )
    lines.append(f"    ({plan.scheduled_note})")
    hours = plan.steps * times.step / 3600
    lines += [
        "",
        "the run, modelled",
        _row("model FLOPs utilisation", f"{plan.modelled_mfu:.1%}"),
        *([] if plan.scheduled_mfu is None else [_row("  by the compiler's schedule", f"{plan.scheduled_mfu:.1%}")]),
        _row("pairs a second", f"{plan.batch_size / times.step:,.0f}"),
        _row(f"days for {plan.steps:,} steps", f"{plan.steps * times.step / SECONDS_OF_A_DAY:,.1f}"),
        _row("chip-hours", f"{hours * plan.num_chips:,.0f}"),
    ]
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"  {name:<34} {value:>20}"


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f} GiB"
