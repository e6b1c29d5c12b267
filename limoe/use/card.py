"""The model card of an export: what the model is, what it learnt from, how good it is, and what it is not for."""

from __future__ import annotations

from typing import Any

from limoe.config.schema import Config
from limoe.model.describe import describe


def model_card(config: Config, step: int, summary: dict[str, Any]) -> str:
    """Write the card in Markdown, with the scores of a finished run's summary.

    >>> from limoe.config.presets import preset
    >>> print(model_card(preset("tiny"), 500, {"zero_shot_top1": 0.98}).splitlines()[0])
    # LIMoE tiny, step 500
    """
    model, found = config.model, describe(config)
    data = config.data.shards or f"the embedded world, {config.data.world_pairs:,} rendered scenes with captions"
    scores = {
        "zero-shot top-1": summary.get("zero_shot_top1"),
        "image to text, recall at 1": summary.get("image_to_text_r1"),
        "text to image, recall at 1": summary.get("text_to_image_r1"),
        "success rate of image tokens": summary.get("success_rate_image"),
        "success rate of text tokens": summary.get("success_rate_text"),
    }
    rows = [f"| {name} | {value:.1%} |" for name, value in scores.items() if value is not None]
    table = (
        ["| figure | value |", "|---|---|", *rows] if rows else ["The run was not finished, so there are no scores."]
    )
    experts = f"{model.num_experts} experts in blocks {list(model.moe_layers)}" if model.moe_layers else "dense"
    return "\n".join(
        [
            f"# LIMoE {config.preset}, step {step:,}",
            "",
            "One Transformer for images and text ([LIMoE](https://arxiv.org/abs/2206.02770)): "
            f"{found.parameters_total:,} parameters, of which {found.parameters_per_token:,} work on a token; "
            f"{model.depth} blocks of width {model.width}, {experts}.",
            "",
            "```python",
            "import limoe",
            "",
            'model = limoe.load("this folder")',
            'scores = model.classify(["a.jpg"], ["red circle", "blue square"])',
            "```",
            "",
            "## Data",
            "",
            f"{step:,} steps of {config.train.batch_size:,} pairs from {data}.",
            "",
            "## Scores",
            "",
            *table,
            "",
            "## Limits",
            "",
            f"Images become squares of {model.image_size} pixels and texts are cut after {model.text_length} tokens. "
            "The model knows what its data show; it was not tested for bias, and it must not decide about people.",
            "",
        ]
    )
