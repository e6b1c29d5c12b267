"""What the kernels of every generation of GPUs share."""
