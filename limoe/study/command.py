"""`limoe study`: run a study and write what it found; list the studies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from limoe.config.settings import full_name
from limoe.study.findings import markdown, write_findings
from limoe.study.runner import Finished, Train, cells, run_cells
from limoe.study.statistics import MAX_SEEDS
from limoe.study.studies import SCALES, STUDIES, StudyError, study
from limoe.train.stopping import StopSignals


def run_study(
    name: str,
    folder: Path,
    *,
    scale: str = "small",
    num_seeds: int = 3,
    settings: Sequence[str] = (),
    train: Train | None = None,
    say: Callable[[str], None] = print,
) -> list[Finished]:
    """Run the trainings of a study that are not finished, then write its table and picture, also when stopped.

    All files lie in `folder`/NAME-SCALE. Raises StudyError for an unknown name, scale or number of seeds, those of
    `run_cells`, and, at the end, one that names the trainings that failed.
    """
    chosen = study(name)
    if scale not in SCALES:
        raise StudyError(f"there is no scale {scale!r}; scales are {', '.join(SCALES)}")
    if not 1 <= num_seeds <= MAX_SEEDS:
        raise StudyError(f"--seeds={num_seeds} is not possible; use 1 to {MAX_SEEDS}")
    settings = [full_name(text) for text in settings]
    place = folder / f"{name}-{scale}"
    finished: list[Finished] = []
    failed: dict[str, str] = {}
    with StopSignals() as signals:
        try:
            cell_results = run_cells(
                chosen, scale, num_seeds, place, settings=settings, train=train, say=say, failed=failed
            )
            for one in cell_results:
                finished.append(one)
        except KeyboardInterrupt:
            say(f"Stopped by {signals.received}; the same command goes on from here.")
        finally:
            if finished:
                write_findings(place, name, chosen, finished, failed)
                say(f"{name}: {chosen.compares}\n\n{markdown(chosen, finished)}\nFiles: {place}")
    if failed:
        raise StudyError(
            f"{len(failed)} of {len(cells(chosen, scale, num_seeds))} trainings failed: {', '.join(failed)}; why is in "
            f"{place}/NAME.failed.txt; the same command tries them anew"
        )
    return finished


def list_text(num_seeds: int) -> str:
    """List the studies, and what they cost at each scale.

    >>> print(list_text(3).splitlines()[0].split())
    ['study', 'smoke', 'small', 'full', 'compares']
    """
    lines = [f"{'study':<14}{''.join(f'{scale:>10}' for scale in SCALES)}   compares"]
    for name, one in STUDIES.items():
        costs = [_cost(len(cells(one, scale, num_seeds)), minutes.minutes) for scale, minutes in SCALES.items()]
        lines.append(f"{name:<14}{''.join(f'{cost:>10}' for cost in costs)}   {one.compares}")
    about = (
        "Costs are trainings with this many seeds, times the minutes that one of the first size takes on two CPU cores."
    )
    return "\n".join([*lines, "", about, "Larger sizes take longer; ? = not measured."])


def _cost(trainings: int, minutes: float | None) -> str:
    return f"{trainings} x ?" if minutes is None else f"{trainings * minutes:.0f} min"
