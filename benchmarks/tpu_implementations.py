"""The implementations for TPUs: ours with the table of back ends, ours in XLA alone, and all peers for TPUs."""

from benchmarks.implementations import CHOSEN, from_backend
from benchmarks.peers import PEERS
from moe_kernels.backends.xla import XLA

OURS = (CHOSEN, from_backend(XLA))
IMPLEMENTATIONS = {implementation.name: implementation for implementation in (*OURS, *PEERS)}
