"""What a run learns from, as digests in its work folder: a restart and every host must have the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from limoe.data import files
from limoe.parallel import processes
from limoe.workdir.folder import Workdir, WorkdirError

_SHOWN = 3


def check_data(workdir: Workdir, facts: Mapping[str, str], *, accept: bool) -> tuple[str, ...]:
    """Compare the data of this start with those of the run, and with those of all processes, which all call this.

    The first start writes them. With `accept`, other data are written instead, and what differs is returned. Raises
    WorkdirError, with what differs, in every process.
    """
    text = json.dumps(facts, indent=1)
    digests = processes.texts_of_all(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) > 1:
        first, *others = map(json.loads, processes.texts_of_all(text))
        number, other = next((number, other) for number, other in enumerate(others, 1) if other != first)
        raise WorkdirError(
            f"process {number} has other data than process 0: {different(first, other, 'in process 0', 'there')}; give "
            "all hosts the same files"
        )
    before = json.loads(files.read_text(workdir.data)) if files.exists(workdir.data) else dict(facts)
    changes = different(before, facts, "before", "now")
    if changes and not accept:
        raise WorkdirError(
            f"{workdir.path} began with other data: {changes}; put them back, or go on with these and --accept-new-data"
        )
    processes.wait_for_all("the data of the run are known")
    if processes.is_first():
        files.write_bytes(workdir.data, text.encode())
    return (f"accepted new data: {changes}",) if changes else ()


def different(first: Mapping[str, str], second: Mapping[str, str], at_first: str, at_second: str) -> str:
    """Format the first few facts that differ; "" if none does.

    >>> different({"data 0.tar": "9 bytes"}, {"data 0.tar": "9 bytes", "data 1.tar": "7 bytes"}, "before", "now")
    'data 1.tar (missing before, 7 bytes now)'
    """
    names = [name for name in dict.fromkeys((*first, *second)) if first.get(name) != second.get(name)]
    listed = [
        f"{name} ({first.get(name, 'missing')} {at_first}, {second.get(name, 'missing')} {at_second})"
        for name in names[:_SHOWN]
    ]
    return ", ".join(listed) + f", and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)


def check_tokenizer(workdir: Workdir) -> None:
    """Raise WorkdirError if the tokenizer in a work folder is not the one that the run began with."""
    if not files.exists(workdir.data):
        return
    known = json.loads(files.read_text(workdir.data)).get("tokenizer")
    found = hashlib.sha256(files.read_bytes(workdir.tokenizer)).hexdigest()[:16]
    if known != found:
        raise WorkdirError(
            f"{workdir.tokenizer} is not the tokenizer of this run (digest {found}, not {known}); put that one back"
        )
