"""What each host must read and decode so that its chips do not wait, beside what one core and one process can do."""

from __future__ import annotations

from typing import NamedTuple

# A JPEG of 256 px, as docs/data.md advises to store for 224: its bytes, the processor time of decoding and resizing,
# and the part of it that holds the interpreter's lock, of which a process has one. Measured by
# benchmarks/data_pipeline.py and on the parts of `decode` on a core of an AMD EPYC beside other work, 2026-12-01.
PICTURE_BYTES = 20_000
CORE_SECONDS = 1.2e-3
LOCK_SECONDS = 0.28e-3


class HostInput(NamedTuple):
    """The input of one host: pictures and bytes a second, cores to decode them, pictures a second of one process."""

    num_hosts: int
    pictures_per_second: float
    bytes_per_second: float
    cores: float
    most_per_second: float

    @property
    def is_the_limit(self) -> bool:
        """Say whether one process, however many cores it has, is slower than the chips of its host."""
        return self.pictures_per_second > self.most_per_second


def host_input(num_hosts: int, batch_size: int, step_seconds: float) -> HostInput:
    """Compute what a host must read for its share of a batch in each step.

    >>> found = host_input(16, 65_536, 0.5)
    >>> found.pictures_per_second, round(found.cores, 1), found.is_the_limit
    (8192.0, 9.8, True)
    """
    rate = batch_size / step_seconds / num_hosts
    return HostInput(num_hosts, rate, rate * PICTURE_BYTES, rate * CORE_SECONDS, 1 / LOCK_SECONDS)
