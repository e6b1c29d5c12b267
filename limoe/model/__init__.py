"""The tower: one Transformer for image and text tokens, with its attention and its mixture-of-experts block."""
