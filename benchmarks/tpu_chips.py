"""What is assumed of one JAX device of each TPU: clock, peaks and matrix units. Modelled times hang on these figures.

Clocks have no API; those of v5p and 7x are uncertain by 15% (libtpu's own model has 1.5 and 1.9 GHz), so shares of a
floor say more than microseconds. A device of v5p is a chip with two TensorCores, one of v4 and 7x is a single core.
"""

import dataclasses

from benchmarks.roofline import Device

GRANULE = 32
"""Bytes that the compiler counts copies in."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. `mxu_depth` is the number of rows and columns of a matrix unit; rates are for all its cores."""

    name: str
    kind: str
    """As JAX names it."""
    topology: str
    """The smallest one that libtpu describes."""
    gigahertz: float
    macs_per_cycle: int
    """bfloat16 multiply-adds of a core."""
    mxu_depth: int
    hbm_gbytes_per_s: float
    num_cores: int = 1

    @property
    def flops(self) -> float:
        """bfloat16 FLOP/s."""
        return 2e9 * self.gigahertz * self.macs_per_cycle * self.num_cores

    @property
    def device(self) -> Device:
        """As the roofline sees it; a float32 product takes six bfloat16 passes."""
        rates = {"bfloat16": self.flops, "float32": self.flops / 6}
        return Device(f"TPU {self.name}", rates, 1e9 * self.hbm_gbytes_per_s, "assumed clock and data sheet")


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", "v4:2x2x1", 1.05, 65_536, 128, 614),
        Chip("v5e", "TPU v5 lite", "v5e:2x2", 1.5, 65_536, 128, 819),
        Chip("v5p", "TPU v5", "v5p:2x2x1", 1.75, 65_536, 128, 2_765, num_cores=2),
        Chip("v6e", "TPU v6 lite", "v6e:2x2", 1.75, 262_144, 256, 1_640),
        Chip("7x", "TPU7x", "tpu7x:2x2x1", 2.2, 262_144, 256, 3_690),
    )
}
