"""Use the TPU compiler on a machine without a TPU, and read the schedules that it writes."""

from __future__ import annotations

import os
from pathlib import Path

# Environment variables that libtpu reads when it is loaded. Those that are set already stay.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes may compile at a time
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # silences a warning; the topology decides
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_TEXTS = "final_bundles"


def prepare() -> None:
    """Set libtpu's environment for a machine without a TPU. Call this before libtpu is loaded."""
    import jax

    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")


def schedule_options(folder: Path) -> str:
    """Make the `LIBTPU_INIT_ARGS` that have the final bundles of every instruction written into a folder.

    The folder gets the bundles of all programs of the process. The last option gives equal fusions a text each.
    """
    options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_TEXTS}"
    return f"{options} --xla_jf_hlo_deduplication_all_unique=true"


def write_schedules(folder: Path) -> None:
    """Have the final bundles written into a folder. Call this before libtpu is loaded."""
    options = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {schedule_options(folder)}"
    os.environ["LIBTPU_INIT_ARGS"] = options.strip()


def read_schedules(folder: Path) -> dict[str, str]:
    """Read the final bundles by instruction. Those of the top level are called TLP."""
    texts = {}
    for path in folder.glob(f"*-{_TEXTS}.txt"):
        # <time>-<instruction>-<number of the pass>-final_bundles.txt; another file of the pass has schedule-analysis.
        _, _, rest = path.name.removesuffix(f"-{_TEXTS}.txt").partition("-")
        name, _, number = rest.rpartition("-")
        if number.isdigit():
            texts[name] = path.read_text(encoding="utf-8", errors="replace")
    return texts
