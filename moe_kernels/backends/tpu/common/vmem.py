"""VMEM arithmetic that block sizes of several verbs share; pure."""

from __future__ import annotations

from moe_kernels.chips import MIB, Tpu
from moe_kernels.fitted import FITTED
from moe_kernels.types import round_up


def vmem_bytes(rows: int, columns: int, itemsize: int) -> int:
    """VMEM of an array: rows padded to registers, columns to 128 lanes."""
    return round_up(rows, 32 // itemsize) * round_up(columns, 128) * itemsize


def needed_vmem(arrays: int) -> int:
    """Bytes of VMEM that a kernel needs for so many bytes of arrays and values."""
    return int(FITTED.margin * arrays) + FITTED.slack_bytes


def fits(needed: int, chip: Tpu) -> bool:
    """Whether a kernel that needs so many bytes may be given them; a launcher adds as many as are left out here."""
    return needed <= chip.vmem - MIB
