"""What a finished run shows: figures of routing, pictures, the summary."""
