"""Config, presets, settings: what is refused and in what words, the paper's sizes, JSON there and back."""

import json
import math
import operator
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limoe.config.presets import PRESETS, preset
from limoe.config.schema import Config, ConfigError, ModelConfig
from limoe.config.section import checked, names_of, setting_types
from limoe.config.settings import SECTIONS, differences, from_json, override, settings_help, to_json

TINY = preset("tiny")
ALL_NAMES = [f"{section}.{name}" for section, kind in SECTIONS.items() for name in setting_types(kind)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["image_size=50"], ["model.image_size=50", "model.patch_size=8", "use 48 or 56"]),
        (["image_size=4"], ["model.image_size=4", "use 8"]),
        (["num_heads=3"], ["model.num_heads=3", "model.width=128", "divisor"]),
        (["moe_layers=3,1"], ["model.moe_layers=(3, 1)", "ascending"]),
        (["moe_layers=1,1"], ["ascending without repeats"]),
        (["moe_layers=4"], ["model.moe_layers=(4,)", "0..3"]),
        (["moe_layers=-1"], ["0..3"]),
        (["num_choices=9"], ["model.num_choices=9", "model.num_experts=8"]),
        (["num_choices=0"], ["model.num_choices=0", "positive"]),
        (["capacity_factor=0"], ["model.capacity_factor=0.0", "positive"]),
        (["vocab_size=2"], ["model.vocab_size=2"]),
        (["router_noise=-1"], ["model.router_noise=-1.0", "not be negative"]),
        (["router_noise=0"], ["model.router_noise=0.0", "loss.load=false"]),
        (["group_examples=-1"], ["model.group_examples=-1"]),
        (["group_examples=24"], ["model.group_examples=24", "128 examples", "use a divisor of 128"]),
        (["accumulation=3"], ["train.accumulation=3", "train.batch_size=128", "divisor"]),
        (["accumulation=2"], ["train.accumulation=2", "one routing group", "model.group_examples", "64 examples"]),
        (["accumulation=4", "group_examples=64"], ["model.group_examples=64", "chunk of 32", "would be cut"]),
        (["batch_size=1"], ["train.batch_size=1", "at least 2"]),
        (["steps=0"], ["train.steps=0", "positive"]),
        (["steps=219"], ["warmup_steps=40", "cooldown_steps=180", "train.steps=219", "lower them"]),
        (["checkpoints_kept=1"], ["train.checkpoints_kept=1", "at least 2"]),
        (["train.seed=-1"], ["train.seed=-1"]),
        (["learning_rate=0"], ["optimizer.learning_rate=0.0", "positive"]),
        (["beta2_cap=1"], ["optimizer.beta2_cap=1.0", "below 1"]),
        (["z_weight=-0.5"], ["loss.z_weight=-0.5"]),
        (["extra=mine=1"], ["loss.extra='mine=1'", "'mine' is no registered auxiliary loss; there are: none"]),
        (["extra=mine=1,mine=2"], ["loss.extra=", "each loss once"]),
        (["threshold_experts_text=0.5"], ["loss.threshold_experts_text=0.5", "at least 1"]),
        (["threshold_experts_image=9"], ["loss.threshold_experts_image=9.0", "model.num_experts=8"]),
        (["max_bad_share=1"], ["data.max_bad_share=1.0"]),
        (["threads=0"], ["data.threads=0"]),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        override(TINY, settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["router_noise=0", "load=false"],
        ["accumulation=4", "group_examples=32"],
        ["accumulation=4", "group_examples=8"],
        ["accumulation=4", "moe_layers=()"],  # no routing, no groups to cut
        ["group_examples=24", "moe_layers=()"],
        ["steps=400"],
        ["steps=1", "warmup_steps=0", "cooldown_steps=0"],
        ["num_choices=8"],
        ["num_experts=1", "num_choices=1"],
        ["threshold_experts_text=8"],
        ["clip_norm=0", "weight_decay=0", "momentum=0"],
    ],
)
def test_the_edge_of_what_fits_is_accepted(settings):
    override(TINY, settings)


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("model.depth", "4", "integer"),
        ("model.depth", True, "integer"),
        ("model.depth", 4.0, "integer"),
        ("model.moe_layers", [1, 3], "integers"),
        ("model.moe_layers", (1.0,), "integers"),
        ("model.capacity_factor", math.nan, "number"),
        ("model.capacity_factor", "1", "number"),
        ("model.capacity_factor", False, "number"),
        ("model.priority", "best", "bpr | arrival"),
        ("loss.z", 1, "true | false"),
        ("data.shards", None, "text"),
    ],
)
def test_ill_typed_values_are_refused(name, bad, allowed):
    section, field = name.split(".")
    with pytest.raises(ConfigError) as error:
        checked(name, bad, setting_types(SECTIONS[section])[field])
    assert f"{name}={bad!r} is not of the right type; use {allowed}" in str(error.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_types_are_checked_when_a_section_is_built(bad):
    with pytest.raises(ConfigError, match=r"model\.capacity_factor=.* use number"):
        replace(TINY.model, capacity_factor=bad)


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        TINY.model.depth = 5  # type: ignore[misc]


def test_every_preset_has_a_dense_twin_that_differs_in_nothing_else():
    sparse = ["tiny", "s32", "b32", "b16", "l16", "h14"]
    assert sorted(PRESETS) == sorted(sparse + [f"{name}-dense" for name in sparse])
    for name, config in PRESETS.items():
        assert config.preset == name
    for name in sparse:
        assert differences(preset(name), preset(f"{name}-dense")) == ["preset", "model.moe_layers"]
        assert preset(f"{name}-dense").model.moe_layers == ()


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no preset 'h-14'; did you mean 'h14'\?"):
        preset("h-14")
    with pytest.raises(ConfigError, match="no preset 'zzz'; presets are tiny, s32"):
        preset("zzz")


def num_parameters(model: ModelConfig) -> tuple[int, int]:
    """All parameters of the tower and those of its routers, counted from the paper's text (section 1)."""
    width, hidden = model.width, model.mlp_width
    attention = 4 * (width * width + width)
    mlp = width * hidden + hidden + hidden * width + width
    routers = len(model.moe_layers) * width * model.num_experts
    blocks = model.depth * (attention + mlp + 2 * 2 * width) + len(model.moe_layers) * (model.num_experts - 1) * mlp
    patch = model.patch_size**2 * 3 * width + width
    text = model.vocab_size * width + model.text_length * width
    ends = model.num_image_tokens * width + 2 * width + 2 * width * width
    return blocks + routers + patch + text + ends, routers


@pytest.mark.parametrize(
    ("name", "tokens", "millions"),
    [("s32", 49, 43.7), ("b32", 49, 113.2), ("b16", 196, 111.6), ("l16", 196, 338.2), ("h14", 256, 675.0)],
)
def test_the_paper_s_sizes(name, tokens, millions):
    model = preset(f"{name}-dense").model
    assert model.num_image_tokens == tokens and model.tokens_per_example == tokens + 16
    assert num_parameters(model)[0] / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_paper_s_h14():
    config = preset("h14")
    total, routers = num_parameters(config.model)
    assert total / 1e9 == pytest.approx(5.554, abs=0.001)
    assert routers == 491_520
    assert len(config.model.moe_layers) == 12
    assert (config.train.batch_size, config.num_groups) == (21_504, 512)


def test_which_blocks_of_the_paper_s_sizes_hold_experts():
    assert preset("s32").model.moe_layers == (1, 3, 5, 7)
    assert preset("b16").model.moe_layers == (1, 3, 5, 7, 9, 11)
    assert preset("l16").model.moe_layers == (13, 15, 17, 19, 21, 23)
    assert preset("h14").model.moe_layers == (3, 7, 11, 15, 17, 19, 21, 23, 25, 27, 29, 31)


def test_thresholds_of_the_global_entropy():
    assert preset("b16").loss.threshold("text", 32) == pytest.approx(2.1972, abs=1e-4)  # log 9
    assert preset("b16").loss.threshold("image", 32) == pytest.approx(2.9957, abs=1e-4)  # log 20
    assert TINY.loss.threshold("text", 8) == pytest.approx(math.log(9 * 8 / 32))
    changed = override(TINY, ["threshold_experts_text=3", "threshold_experts_image=5"])
    thresholds = [changed.loss.threshold(modality, 8) for modality in ("text", "image")]
    assert thresholds == [math.log(3), math.log(5)]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("model.depth=6", "model.depth", 6),
        ("depth = 6", "model.depth", 6),
        ("learning_rate=2e-4", "optimizer.learning_rate", 2e-4),
        ("weight_decay=1", "optimizer.weight_decay", 1.0),
        ("z=false", "loss.z", False),
        ("local_image=True", "loss.local_image", True),
        ("priority=arrival", "model.priority", "arrival"),
        ("moe_layers=()", "model.moe_layers", ()),
        ("moe_layers=2", "model.moe_layers", (2,)),
        ("moe_layers=0,2", "model.moe_layers", (0, 2)),
        ("moe_layers=(0, 2)", "model.moe_layers", (0, 2)),
        ("moe_layers=(2,)", "model.moe_layers", (2,)),
        ("shards=a=b", "data.shards", "a=b"),
        ("tokenizer=", "data.tokenizer", ""),
        ("data.seed=3", "data.seed", 3),
    ],
)
def test_override_parses_by_type(text, name, value):
    changed = operator.attrgetter(name)(override(TINY, [text]))
    assert changed == value and type(changed) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rte=1", "no setting 'learning_rte'; did you mean optimizer.learning_rate?"),
        ("model.learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("model.seed=1", "did you mean data.seed or train.seed?"),
        ("train.lr=1", "no setting 'train.lr'; did you mean optimizer.learning_rate?"),
        ("data.path=x", "did you mean data.shards?"),
        ("modle.depth=1", "did you mean model.depth?"),
        ("qqqq=1", "no setting 'qqqq'; limoe train --help"),
        ("seed=1", "'seed' is ambiguous; use data.seed or train.seed"),
        ("preset=b16", "--preset=NAME"),
        ("model=1", "no setting 'model'"),
        ("steps", "'steps' has no value; write it as name=value"),
        ("steps=1e3", "train.steps=1e3 is not of the right type; use integer"),
        ("steps=", "train.steps= is not of the right type"),
        ("learning_rate=fast", "optimizer.learning_rate=fast is not of the right type; use number"),
        ("learning_rate=nan", "optimizer.learning_rate=nan is not of the right type"),
        ("z=1", "loss.z=1 is not of the right type; use true | false"),
        ("priority=arival", "did you mean arrival? use bpr | arrival | random | image_first | text_first"),
        ("moe_layers=1;3", "use integers like 1,3 or ()"),
        ("moe_layers=", "use integers like 1,3 or ()"),
        ("moe_layers=1,,3", "use integers like 1,3 or ()"),
    ],
)
def test_override_refuses_with_the_nearest_right_name(text, words):
    with pytest.raises(ConfigError) as error:
        override(TINY, [text])
    assert words in str(error.value)


def test_override_refuses_a_setting_given_twice():
    with pytest.raises(ConfigError, match=r"train\.steps is given twice"):
        override(TINY, ["steps=500", "train.steps=600"])


def test_override_checks_only_when_all_is_set():
    settings = ["image_size=28", "patch_size=7"]
    assert override(TINY, settings) == override(TINY, settings[::-1])
    assert override(TINY, []) == TINY


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_is_exact(name):
    assert from_json(to_json(preset(name))) == preset(name)


@given(st.floats(1e-300, 1e300), st.integers(0, 2**63 - 1), st.text())
def test_json_keeps_every_bit(rate, seed, folder):
    config = replace(
        TINY,
        optimizer=replace(TINY.optimizer, learning_rate=rate),
        train=replace(TINY.train, seed=seed),
        data=replace(TINY.data, shards=folder),
    )
    assert from_json(to_json(config)) == config


def damaged(change: Any) -> str:
    tree = json.loads(to_json(TINY))
    change(tree)
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "the config holds []"),
        (damaged(lambda tree: tree.update(models={})), "unknown setting models; the nearest setting is model"),
        (damaged(lambda tree: tree["model"].update(dept=4)), "model.dept; the nearest setting is model.depth"),
        (damaged(lambda tree: tree["train"].pop("steps")), "lacks train.steps"),
        (damaged(lambda tree: tree.pop("loss")), "lacks loss"),
        (damaged(lambda tree: tree.update(loss=3)), "the config holds 3 instead of the settings loss."),
        (damaged(lambda tree: tree.update(preset=3)), "preset=3"),
        (damaged(lambda tree: tree["train"].update(steps="9")), "train.steps='9' is not of the right type"),
        (damaged(lambda tree: tree["train"].update(steps=[9])), "train.steps=(9,) is not of the right type"),
        (damaged(lambda tree: tree["optimizer"].update(learning_rate=math.nan)), "optimizer.learning_rate=nan"),
        (damaged(lambda tree: tree["model"].update(image_size=50)), "model.image_size=50"),
    ],
)
def test_from_json_refuses(text, words):
    with pytest.raises(ConfigError) as error:
        from_json(text)
    assert words in str(error.value)


def changed_value(value: Any, kind: Any) -> Any:
    if names_of(kind):
        return next(choice for choice in names_of(kind) if choice != value)
    return {bool: lambda: not value, str: lambda: value + "x"}.get(kind, lambda: value * 2 or 1)()


@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_setting_counts_in_differences_and_json(name):
    section, field = name.split(".")
    kind = setting_types(SECTIONS[section])[field]
    config = replace(TINY, train=replace(TINY.train, batch_size=128, steps=4_000))
    value = (1,) if kind == tuple[int, ...] else changed_value(operator.attrgetter(name)(config), kind)
    # Not every single change is a valid config, so the check is stepped around: the two functions only read fields.
    changed_section, changed = object.__new__(SECTIONS[section]), object.__new__(Config)
    changed_section.__dict__.update(getattr(config, section).__dict__ | {field: value})
    changed.__dict__.update(config.__dict__ | {section: changed_section})
    assert differences(config, changed) == [name]
    assert to_json(config) != to_json(changed)


def test_whole_numbers_and_floats_are_one_setting():
    tree = json.loads(to_json(TINY))
    tree["optimizer"]["learning_rate"] = 1
    assert to_json(from_json(json.dumps(tree))) == to_json(override(TINY, ["learning_rate=1.0"]))


def test_help_lists_every_setting_as_it_can_be_set():
    lines = settings_help("h14").splitlines()
    shown = [line for line in lines[1:] if not line.startswith(" ")]
    assert [line.split(" = ")[0] for line in shown] == ALL_NAMES
    assert "model.moe_layers = 3,7,11,15,17,19,21,23,25,27,29,31  [integers like 1,3 or ()]" in shown
    assert "loss.local_image = false  [true | false]" in shown
    settings = [line.split("  [")[0] for line in shown]
    assert override(TINY, settings) == replace(preset("h14"), preset="tiny")


def test_every_setting_has_a_help_text():
    for kind in SECTIONS.values():
        for field in fields(kind):
            assert field.metadata["help"]
