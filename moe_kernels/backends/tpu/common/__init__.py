"""What the TPU kernels of several verbs share."""
