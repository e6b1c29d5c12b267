"""Image-text data: shards on disk, random access to their examples, and the global batch of each step."""
