"""Routing on TPUs, forward and backward."""
