"""The layer with its experts spread over a mesh."""
