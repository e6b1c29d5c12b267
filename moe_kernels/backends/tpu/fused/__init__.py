"""Dispatch, experts and combine as one TPU kernel, forward and backward."""
