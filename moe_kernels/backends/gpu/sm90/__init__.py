"""Kernels for Hopper (compute capability 9.0), whose matmuls are wgmma."""
