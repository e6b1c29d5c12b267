"""What is compared on a TPU: ours by the table of back ends, ours in XLA alone, and all peers that have a TPU form."""

from benchmarks.implementations import CHOSEN, from_backend
from benchmarks.peers import PEERS
from moe_kernels.backends.xla import XLA

OURS = (CHOSEN, from_backend(XLA))
IMPLEMENTATIONS = {implementation.name: implementation for implementation in (*OURS, *PEERS)}
