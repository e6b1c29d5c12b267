"""The tower: one Transformer for image and text tokens, its attention and its mixture-of-experts block."""
