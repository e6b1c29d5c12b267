"""Expert MLPs on TPUs, forward and backward."""
