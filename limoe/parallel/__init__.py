"""The mesh of devices, and the processes that train together."""
