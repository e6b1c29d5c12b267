"""Dispatch and combine on TPUs; both directions, and both derivatives, are gathers."""
