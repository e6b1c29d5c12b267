"""Settings by name: setting them from the command line, JSON, comparison, help."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_origin, get_type_hints

from limoe.config.presets import preset
from limoe.config.schema import Config, ConfigError
from limoe.config.section import checked, fits, names_of, setting_types, type_name
from limoe.errors import nearest

FORMAT = 3
"""Number of the format that `to_json` writes. limoe 0.1.0 wrote the first format, without a number; no release
wrote the second."""

SECTIONS: dict[str, type] = {name: kind for name, kind in get_type_hints(Config).items() if name != "preset"}

# The format with which settings came that the first one did not have, and what every format before it worked with: None
# for today's default.
_NEW_IN: dict[int, dict[str, Any]] = {
    2: {"loss.extra": None, "train.routing_every": None},
    3: {
        **dict.fromkeys(("loss.max_logit_scale", "loss.mask_equal_captions")),
        **dict.fromkeys(("train.non_finite", "train.max_skipped", "data.rewound_at")),
        **dict.fromkeys(("init.source", "init.digest", "init.upcycle", "init.noise")),
        **dict.fromkeys(("data.sources", "data.preprocess", "data.interpolation", "data.world")),
        **dict.fromkeys(("data.order", "data.block_size", "data.shuffle_buffer")),
        "data.background": "black",
    },
}

# What those type who know open_clip, whose names are like other settings here.
_OF_OPEN_CLIP = {
    **dict.fromkeys(("lr", "train.lr", "optimizer.lr"), "optimizer.learning_rate"),
    **dict.fromkeys(("train_data", "data.path", "data.train", "data.train_data"), "data.shards"),
    **dict.fromkeys(("val_data", "imagenet_val", "data.val", "data.val_data"), "data.eval_shards"),
    **dict.fromkeys(("wd", "optimizer.wd"), "optimizer.weight_decay"),
    **dict.fromkeys(("warmup", "train.warmup"), "optimizer.warmup_steps"),
    **dict.fromkeys(("workers", "data.workers"), "data.threads"),
    **dict.fromkeys(("accum_freq", "train.accum_freq"), "train.accumulation"),
    **dict.fromkeys(("siglip", "loss.siglip"), "loss.contrastive=sigmoid"),
}

# A message lists at most so many settings that differ. Two presets can differ in twenty.
_VALUES_SHOWN = 5


@dataclass(frozen=True)
class _Setting:
    section: str
    field: str
    kind: Any
    help: str

    @property
    def name(self) -> str:
        return f"{self.section}.{self.field}"


def _all_settings() -> Iterator[_Setting]:
    for section, kind in SECTIONS.items():
        types = setting_types(kind)
        for field in fields(kind):
            yield _Setting(section, field.name, types[field.name], field.metadata["help"])


_SETTINGS: dict[str, _Setting] = {setting.name: setting for setting in _all_settings()}


def full_name(text: str) -> str:
    """Write a setting `name=value` with its dotted name. Raises ConfigError for an unknown one, or without a value.

    >>> full_name("steps=5")
    'train.steps=5'
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"setting {text!r} has no value; write it as name=value")
    return f"{_find(name.strip()).name}={value.strip()}"


def _find(name: str) -> _Setting:
    """Find a setting by its dotted name, or by its field name if only one section has it."""
    if name in _SETTINGS:
        return _SETTINGS[name]
    if name == "preset":
        raise ConfigError("preset is not a setting; choose one with --preset=NAME")
    if name in _OF_OPEN_CLIP:
        raise ConfigError(f"there is no setting {name!r}; did you mean {_OF_OPEN_CLIP[name]}?")
    same_field = [setting.name for setting in _SETTINGS.values() if setting.field == name.rpartition(".")[2]]
    if "." not in name and len(same_field) == 1:
        return _SETTINGS[same_field[0]]
    if "." not in name and same_field:
        raise ConfigError(f"setting {name!r} is ambiguous; use {' or '.join(same_field)}")
    bare = {setting.field: setting.name for setting in _SETTINGS.values()}
    close = nearest(name, [*_SETTINGS, *bare])
    meant = same_field or ([bare.get(close, close)] if close else [])
    hint = f"did you mean {' or '.join(meant)}?" if meant else "limoe train --help lists all settings"
    raise ConfigError(f"there is no setting {name!r}; {hint}")


def _parse(text: str, setting: _Setting) -> Any:
    """Parse a text to the type of a setting."""
    kind = setting.kind
    value: Any = text
    try:
        if kind is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif get_origin(kind) is tuple:
            value = _parse_integers(text)
        elif kind in (int, float):
            value = kind(text)
    except (KeyError, ValueError):
        value = None
    if not fits(value, kind):
        close = nearest(text, names_of(kind))
        hint = f"did you mean {close}? " if close else ""
        raise ConfigError(f"{setting.name}={text} is not of the right type; {hint}use {type_name(kind)}")
    return value


def _parse_integers(text: str) -> tuple[int, ...]:
    """Parse `1,3`, `(1, 3)` or `()`. An empty text is probably a mistake and raises ValueError."""
    inner = text.removeprefix("(").removesuffix(")").strip()
    if not inner and text:
        return ()
    return tuple(int(item) for item in inner.removesuffix(",").split(","))


def override(config: Config, settings: Sequence[str]) -> Config:
    """Replace settings, each given as `section.field=value`, or as `field=value` if that is unambiguous.

    Checks come after all replacements, so the order does not matter. Raises ConfigError if a setting is unknown (with
    the nearest name), ambiguous, given twice, of a wrong type (with the allowed ones), or does not fit the others.

    >>> tiny = preset("tiny")
    >>> override(tiny, ["moe_layers=()", "train.seed=7"]).train.seed
    7
    >>> override(tiny, ["optimizer.learning_rte=1e-4"])
    Traceback (most recent call last):
    limoe.config.section.ConfigError: there is no setting 'optimizer.learning_rte'; did you mean
    optimizer.learning_rate?
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"setting {text!r} has no value; write it as name=value")
        setting = _find(name.strip())
        section = changes.setdefault(setting.section, {})
        if setting.field in section:
            raise ConfigError(f"{setting.name} is given twice; keep one")
        section[setting.field] = _parse(value.strip(), setting)
    sections = {section: replace(getattr(config, section), **values) for section, values in changes.items()}
    return replace(config, **sections)


def to_json(config: Config) -> str:
    """Write a config as indented JSON, from which `from_json` makes an equal config.

    >>> from_json(to_json(preset("h14"))) == preset("h14")
    True
    """
    return json.dumps({"format": FORMAT, **asdict(config)}, indent=2) + "\n"


def from_json(text: str) -> Config:
    """Read a config that `to_json` wrote, in this format or an earlier one.

    Raises ConfigError if the text is not JSON, a setting is unknown or missing, or a value is not allowed. Only
    settings that its format did not have get defaults.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not JSON: {error}") from error
    written = tree.pop("format", 1) if isinstance(tree, dict) else FORMAT
    if written not in range(1, FORMAT + 1):
        raise ConfigError(f"the config has format {written!r}, which this version cannot read; use a newer version")
    later = {name: value for number, names in _NEW_IN.items() if number > written for name, value in names.items()}
    new_sections = [section for section, kind in SECTIONS.items() if later.keys() >= set(_names(section, kind))]
    _check_keys(tree, [name for name in ("preset", *SECTIONS) if name not in new_sections], "")
    if not isinstance(tree["preset"], str):
        raise ConfigError(f"preset={tree['preset']!r} in the config must be a text")
    sections = {}
    for section, kind in SECTIONS.items():
        types = setting_types(kind)
        former = {name: later[f"{section}.{name}"] for name in types if later.get(f"{section}.{name}") is not None}
        given = tree.get(section, {})
        _check_keys(given, [name for name in types if f"{section}.{name}" not in later], f"{section}.")
        given = former | given
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        sections[section] = kind(**{name: checked(f"{section}.{name}", values[name], types[name]) for name in values})
    return Config(preset=tree["preset"], **sections)


def _names(section: str, kind: type) -> list[str]:
    return [f"{section}.{name}" for name in setting_types(kind)]


def is_of_first_format(text: str) -> bool:
    """Say whether limoe 0.1.0 wrote a config that `from_json` reads.

    >>> is_of_first_format(to_json(preset("tiny")))
    False
    """
    return "format" not in json.loads(text)


def _check_keys(tree: Any, names: list[str], prefix: str) -> None:
    if not isinstance(tree, dict):
        raise ConfigError(f"the config holds {tree!r} instead of the settings {prefix}...")
    for name in tree:
        if name not in names:
            close = nearest(name, names)
            hint = f"; the nearest setting is {prefix}{close}" if close else ""
            raise ConfigError(f"the config has an unknown setting {prefix}{name}{hint}")
    missing = [prefix + name for name in names if name not in tree]
    if missing:
        raise ConfigError(f"the config lacks {', '.join(missing)}; was it written by another version?")


def differences(first: Config, second: Config) -> list[str]:
    """List the dotted names of settings that differ between two configs, in the order of the help.

    >>> differences(preset("tiny"), override(preset("tiny"), ["train.seed=1", "z=false"]))
    ['loss.z', 'train.seed']
    """
    return [name for name in ("preset", *_SETTINGS) if value_of(first, name) != value_of(second, name)]


def both_values(names: Sequence[str], first: Config, second: Config, at_first: str, at_second: str) -> str:
    """Format the first few of these settings with their values in two configs, for a message. Texts are quoted.

    >>> both_values(["train.seed"], preset("tiny"), override(preset("tiny"), ["train.seed=1"]), "there", "now")
    'train.seed (0 there, 1 now)'
    """
    listed = ", ".join(
        f"{name} ({_quoted(value_of(first, name))} {at_first}, {_quoted(value_of(second, name))} {at_second})"
        for name in names[:_VALUES_SHOWN]
    )
    return listed + f", and {len(names) - _VALUES_SHOWN} more" * (len(names) > _VALUES_SHOWN)


def value_of(config: Config, name: str) -> Any:
    """Get the value of a setting by its dotted name.

    >>> value_of(preset("tiny"), "model.depth")
    4
    """
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def settings_help(preset_name: str = "tiny") -> str:
    """List every setting with its value in a preset, type and help.

    >>> print(settings_help().splitlines()[1])
    model.depth = 4  [integer]
    """
    config = preset(preset_name)
    lines = [f"Settings for --set, with their values in the preset {preset_name}:"]
    for setting in _SETTINGS.values():
        lines.append(f"{setting.name} = {_shown(value_of(config, setting.name))}  [{type_name(setting.kind)}]")
        lines.append(f"    {setting.help}")
    return "\n".join(lines)


def _shown(value: object) -> str:
    """Format a value so that `override` can read it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "()"
    return str(value)


def _quoted(value: object) -> str:
    """Format a value inside a sentence. Quotes make an empty text visible."""
    return repr(value) if isinstance(value, str) else _shown(value)
