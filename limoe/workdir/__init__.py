"""The work folder of a run: settings, log of metrics, lock, checkpoints."""
