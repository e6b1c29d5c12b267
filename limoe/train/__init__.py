"""The train step and the loop around it: losses, optimiser, signals, progress."""
