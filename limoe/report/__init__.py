"""What a person looks at of a finished run: figures of routing, pictures, the summary; numbers: `limoe.evaluate`."""
