"""Named configurations: `tiny` for two CPU cores, the paper's sizes, and a dense twin of each."""

from dataclasses import replace

from limoe.config.schema import Config, ConfigError, ModelConfig, OptimizerConfig, TrainConfig
from limoe.errors import nearest


def _every_second(depth: int) -> tuple[int, ...]:
    return tuple(range(1, depth, 2))


def _tiny() -> Config:
    """A model that learns the embedded world in minutes on two CPU cores."""
    model = ModelConfig(
        depth=4,
        width=128,
        mlp_width=512,
        num_heads=4,
        patch_size=8,
        image_size=48,
        text_length=16,
        vocab_size=512,
        moe_layers=_every_second(4),
        num_experts=8,
        text_padding="mask",
        scan_unroll=4,
    )
    optimizer = OptimizerConfig(name="adamw", warmup_steps=40, cooldown_steps=180, timescale=1_000.0, weight_decay=1e-4)
    train = TrainConfig(steps=350, batch_size=128, checkpoint_every=100, evaluate_every=50)
    return Config(preset="tiny", model=model, optimizer=optimizer, train=train)


def _paper_sizes() -> list[Config]:
    """The table of the paper's section 1, with the recipe of its section 4, which the defaults hold.

    Which blocks hold experts is [open] for all sizes.
    """
    main = TrainConfig(steps=781_250, batch_size=16_384)
    small = ModelConfig(
        depth=8,
        width=512,
        mlp_width=2048,
        num_heads=8,
        patch_size=32,
        image_size=224,
        text_length=16,
        vocab_size=32_000,
        moe_layers=_every_second(8),
        group_examples=64,
    )
    base = replace(small, depth=12, width=768, mlp_width=3072, num_heads=12, moe_layers=_every_second(12))
    large = replace(
        base,
        depth=24,
        width=1024,
        mlp_width=4096,
        num_heads=16,
        patch_size=16,
        moe_layers=_every_second(24)[6:],
        group_examples=32,
        remat="blocks",
    )
    huge = replace(
        large,
        depth=32,
        width=1280,
        mlp_width=5120,
        patch_size=14,
        moe_layers=(3, 7, 11, 15, 17, 19, 21, 23, 25, 27, 29, 31),
        group_examples=42,
    )
    return [
        Config(preset="s32", model=small, train=main),
        Config(preset="b32", model=base, train=main),
        Config(preset="b16", model=replace(base, patch_size=16, group_examples=32), train=main),
        Config(preset="l16", model=large, train=main),
        # The paper has 21,502 pairs. 21,504 are 512 groups of 42, so each of 512 chips gets whole groups.
        Config(preset="h14", model=huge, train=replace(main, steps=700_000, batch_size=21_504)),
    ]


def _with_dense_twins(configs: list[Config]) -> dict[str, Config]:
    dense = [
        replace(config, preset=f"{config.preset}-dense", model=replace(config.model, moe_layers=()))
        for config in configs
    ]
    return {config.preset: config for config in configs + dense}


PRESETS: dict[str, Config] = _with_dense_twins([_tiny(), *_paper_sizes()])
"""Every preset by name; `NAME-dense` has an ordinary MLP in every block."""


def preset(name: str) -> Config:
    """Get a preset by its name.

    Raises ConfigError, with the nearest name, if there is none.

    >>> preset("h14").model.moe_layers[:5], preset("h14-dense").model.moe_layers
    ((3, 7, 11, 15, 17), ())
    """
    if name in PRESETS:
        return PRESETS[name]
    close = nearest(name, PRESETS)
    hint = f"did you mean {close!r}? " if close else ""
    raise ConfigError(f"there is no preset {name!r}; {hint}presets are {', '.join(PRESETS)}")
