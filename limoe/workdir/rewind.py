"""Going back to a checkpoint: what came after it moves aside, and the data after it come in another order."""

from __future__ import annotations

import dataclasses

from limoe.data import files
from limoe.workdir.checkpoint import CheckpointError, Checkpoints
from limoe.workdir.folder import Workdir
from limoe.workdir.metrics import MetricsLog


def rewind(workdir: Workdir, step: int) -> str:
    """Make the run in an open work folder continue from the checkpoint of `step`. Returns what was done, in words.

    Later checkpoints, lines of the log and a summary move to `rewound/NUMBER/`, and nothing is deleted. The step is
    added to `data.rewound_at`, so that the data after it come in an order that the run has not had. If this is killed,
    the same call does the rest. Raises CheckpointError if there is no checkpoint of `step`.
    """
    checkpoints = Checkpoints(workdir.checkpoints, read_only=True)
    steps = checkpoints.steps()
    if step not in steps:
        workdir.discard_unstarted()
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"cannot rewind to step {step}; the checkpoints in {checkpoints.folder} are of: {there}")
    aside = workdir.path / "rewound"
    numbers = [int(one.name) for one in aside.iterdir() if one.name.isdecimal()] if aside.is_dir() else []
    kept = aside / str(1 + max(numbers, default=0))
    files.make_folder(kept)
    with files.explained("write", kept):
        later = [one for one in reversed(steps) if one > step]
        for path in [workdir.summary, *map(checkpoints.path, later)]:
            if path.exists():
                path.rename(kept / path.name)
        MetricsLog(workdir.metrics).truncate_after(step, kept=kept / workdir.metrics.name)
    data = workdir.config.data
    # Last. If this is killed before, the run can go on from the checkpoints that are left.
    data = dataclasses.replace(data, rewound_at=(*data.rewound_at, step))
    workdir.record(dataclasses.replace(workdir.config, data=data))
    return (
        f"rewound to step {step}; the steps after it are in {kept}, and the data come in another order now. "
        "Leave out --rewind when you go on later"
    )
