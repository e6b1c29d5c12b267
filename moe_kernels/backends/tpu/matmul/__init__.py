"""Grouped matmul on TPUs, forward and backward."""
