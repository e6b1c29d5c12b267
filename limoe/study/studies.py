"""The table of studies: what each compares, as settings of trainings."""

from __future__ import annotations

from dataclasses import dataclass

from limoe.errors import LimoeError, nearest


class StudyError(LimoeError, ValueError):
    """A study cannot be run. The message says which, why, and what to do."""


@dataclass(frozen=True)
class Arm:
    """One of the things that a study compares: a name and the settings in which it differs.

    `amount` is what a numeric study varies. `as_long_as` names an arm whose measured time this one is given: its steps
    are those that it makes in that time, at the rate at which its twin `rate_of` was measured.
    """

    name: str
    settings: tuple[str, ...] = ()
    amount: float | None = None
    as_long_as: str = ""
    rate_of: str = ""


@dataclass(frozen=True)
class Study:
    """A comparison of arms, all of them with `settings`, at the scale `smoke` also with those of `smoke`.

    Arms are compared with the first one of their size, by the figures `measures`, the most important one first;
    `curves` are drawn over training. `paper` is what the paper says of the same question.
    """

    compares: str
    paper: str
    arms: tuple[Arm, ...]
    measures: tuple[str, ...] = ("zero_shot_top1", "image_to_text_r1", "text_to_image_r1")
    curves: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    smoke: tuple[str, ...] = ()
    all_sizes: bool = False


@dataclass(frozen=True)
class Scale:
    """How large the trainings are: settings by model size, and how many minutes one of the first size takes on two CPU
    cores; None if nobody has measured that."""

    sizes: dict[str, tuple[str, ...]]
    minutes: float | None


_SMOKE = (
    *("model.depth=2", "model.moe_layers=1", "model.width=64", "model.mlp_width=256", "model.num_heads=2"),
    *("train.steps=200", "train.batch_size=64", "train.evaluate_every=0", "train.checkpoint_every=100"),
    *("train.routing_every=50", "optimizer.warmup_steps=30", "optimizer.cooldown_steps=80"),
    "optimizer.learning_rate=0.002",
)
_WIDE = ("model.width=192", "model.mlp_width=768", "model.num_heads=6")
_LARGE = ("model.depth=6", "model.moe_layers=1,3,5", "model.width=256", "model.mlp_width=1024", "model.num_heads=8")
_LONG = (
    *("train.steps=20000", "train.batch_size=1024", "optimizer.warmup_steps=1000", "optimizer.cooldown_steps=8000"),
    *("data.world_pairs=1000000", "train.checkpoint_every=1000", "train.evaluate_every=2000"),
)

# Every study begins with the preset `tiny`. Only `sparse-dense` trains all sizes of a scale, the others the first.
SCALES: dict[str, Scale] = {
    "smoke": Scale({"smallest": _SMOKE}, 1.5),
    "small": Scale({"tiny": (), "wide": _WIDE, "large": _LARGE}, 8.0),
    "full": Scale({"tiny": _LONG, "wide": (*_WIDE, *_LONG), "large": (*_LARGE, *_LONG)}, None),
}

_DENSE = "model.moe_layers=()"
_CLASSIC = ("loss.local_text=false", "loss.global_text=false", "loss.global_image=false")
_SCENES = ("data.world=scenes",)
_ROUTING = ("success_rate_text", "success_rate_image", "effective_experts_text", "effective_experts_image")
_RATES = ("zero_shot_top1", "success_rate_text", "success_rate_image")
# What lets text be dropped: 32 experts, 12 image tokens a text token as in B/16, and padding that is routed. One has
# places for 1.05/32 of the tokens, and text is 1/13 of them. Tokens of one modality are most alike in the last block.
# With the paper's weight of 0.04 the router of so short a training hardly moves from where it began.
_CROWD = (
    *("model.num_experts=32", "model.patch_size=4", "model.text_length=12", "model.text_padding=keep"),
    *("model.moe_layers=3", "loss.aux_weight=0.3"),
)
_CROWD_SMOKE = (
    *("model.depth=4", "model.mlp_width=64", "train.batch_size=16", "train.steps=200"),
    *("optimizer.warmup_steps=20", "optimizer.learning_rate=0.004", "optimizer.cooldown_steps=60"),
)
_ORDERS = ("bpr", "arrival", "random", "image_first", "text_first")
_AUXILIARY = ("importance", "load", "z", "local_text", "global_text", "global_image")


def _amounts(setting: str, amounts: tuple[int | float, ...]) -> tuple[Arm, ...]:
    return tuple(Arm(f"{setting.rpartition('.')[2]}={n:g}", (f"{setting}={n:g}",), float(n)) for n in amounts)


STUDIES: dict[str, Study] = {
    "sparse-dense": Study(
        "LIMoE against its dense twin, at equal applied parameters and steps, and at equal measured time",
        "7% to 13% relative zero-shot gain over the dense model at every size",
        (
            Arm("dense", (_DENSE,)),
            Arm("limoe"),
            Arm("dense, time of limoe", (_DENSE,), as_long_as="limoe", rate_of="dense"),
        ),
        settings=_SCENES,
        all_sizes=True,
    ),
    "losses-bpr": Study(
        "{classic, entropy} losses x {arrival, Batch Priority Routing}",
        "text tokens are dropped with classic losses alone, and kept with entropy losses and BPR",
        (
            Arm("classic, arrival", (*_CLASSIC, "model.priority=arrival")),
            Arm("classic, BPR", _CLASSIC),
            Arm("entropy, arrival", ("model.priority=arrival",)),
            Arm("entropy, BPR"),
        ),
        measures=("success_rate_text", "zero_shot_top1", *_ROUTING[1:]),
        curves=("success_rate_text", "effective_experts_text"),
        settings=_CROWD,
        smoke=_CROWD_SMOKE,
    ),
    "each-loss": Study(
        "every auxiliary loss off in turn, and the local image loss on",
        "the local image loss hurts; the entropy losses of text are what keeps text",
        (
            Arm("all"),
            *(Arm(f"without {name}", (f"loss.{name}=false",)) for name in _AUXILIARY),
            Arm("with local_image", ("loss.local_image=true",)),
        ),
        measures=(*_RATES, "effective_experts_text"),
        settings=_CROWD,
        smoke=_CROWD_SMOKE,
    ),
    "order": Study(
        "who claims a place first: the order of dispatch",
        "BPR is ahead of every fixed order (V-MoE S/16 with K = 1: ImageNet 10-shot 64.5 to 68.9)",
        tuple(Arm(name, (f"model.priority={name}",)) for name in _ORDERS),
        measures=_RATES,
        settings=_CROWD,
        smoke=_CROWD_SMOKE,
    ),
    "experts": Study(
        "2 to 32 experts",
        "more experts help, at equal cost of a token",
        _amounts("model.num_experts", (2, 4, 8, 16, 32)),
        measures=_RATES,
        settings=_SCENES,
    ),
    "choices": Study(
        "K = 1, 2, 4 choices of a token",
        "K = 1 throughout, for its cost",
        _amounts("model.num_choices", (1, 2, 4)),
        measures=_RATES,
        settings=_SCENES,
    ),
    "capacity": Study(
        "capacity factors of 0.5 to 2",
        "1.05 throughout; BPR makes small ones usable",
        _amounts("model.capacity_factor", (0.5, 0.75, 1.05, 1.5, 2)),
        measures=_RATES,
        settings=_SCENES,
    ),
    "threshold": Study(
        "the entropy threshold of text: experts that text is asked to use at least",
        "the number of experts that text uses follows the threshold",
        _amounts("loss.threshold_experts_text", (1, 2, 4, 8, 16)),
        measures=("effective_experts_text", "success_rate_text", "zero_shot_top1"),
        curves=("effective_experts_text",),
        # With the paper's weight of 0.04 so short a training uses all experts, and no threshold is ever reached.
        settings=("model.num_experts=16", "loss.aux_weight=1"),
        smoke=("optimizer.learning_rate=0.004",),
    ),
}


def study(name: str) -> Study:
    """Get a study by its name.

    Raises StudyError, with the nearest name, if there is none.

    >>> [arm.name for arm in study("choices").arms]
    ['num_choices=1', 'num_choices=2', 'num_choices=4']
    """
    if name in STUDIES:
        return STUDIES[name]
    close = nearest(name, STUDIES)
    hint = f"did you mean {close!r}? " if close else ""
    raise StudyError(f"there is no study {name!r}; {hint}studies are {', '.join(STUDIES)}")
