"""Settings by name: set from the command line, written to JSON and read back, compared, listed with their help."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_origin

from limoe.config.presets import preset
from limoe.config.schema import (
    Config,
    ConfigError,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from limoe.config.section import checked, fits, names_of, setting_types, type_name
from limoe.errors import nearest

FORMAT = 2
"""Of what `to_json` writes; that of limoe 0.1.0 was the first and has no mark."""

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
}

# Settings that 0.1.0 did not have, by section.
_SINCE_FORMAT_1 = {"loss": ("extra",), "train": ("routing_every",)}

# Settings that differ which a message lists; another preset alone has twenty.
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


def _find(name: str) -> _Setting:
    """The setting with a dotted name, or with a bare field name that only one section has."""
    if name in _SETTINGS:
        return _SETTINGS[name]
    if name == "preset":
        raise ConfigError("preset is not a setting; choose one with --preset=NAME")
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
    """The value that a text stands for, by the setting's type."""
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
    """`1,3`, `(1, 3)` or `()`; an empty text, more likely a slip than a wish for none, raises ValueError."""
    inner = text.removeprefix("(").removesuffix(")").strip()
    if not inner and text:
        return ()
    return tuple(int(item) for item in inner.removesuffix(",").split(","))


def override(config: Config, settings: Sequence[str]) -> Config:
    """The config with some settings replaced, each given as `section.field=value` or, where unambiguous, `field=value`.

    All are set before anything is checked, so their order does not matter. Raises ConfigError when a setting is unknown
    (with the nearest right name), ambiguous, given twice, ill-typed (with what is allowed), or does not fit the others.

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
    """The config as indented JSON text that `from_json` turns back into an equal config.

    >>> from_json(to_json(preset("h14"))) == preset("h14")
    True
    """
    tree: dict[str, Any] = {"format": FORMAT, "preset": config.preset}
    for section, kind in SECTIONS.items():
        tree[section] = {name: getattr(getattr(config, section), name) for name in setting_types(kind)}
    return json.dumps(tree, indent=2) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote, in this version or in limoe 0.1.0.

    Raises ConfigError when the text is not JSON, when a setting is unknown or missing (nothing is filled in quietly,
    but for settings that 0.1.0 did not have), or when a value is not allowed.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not JSON: {error}") from error
    written = tree.pop("format", 1) if isinstance(tree, dict) else FORMAT
    if written not in (1, FORMAT):
        raise ConfigError(f"the config has format {written!r}, of which this version knows nothing; use a newer one")
    _check_keys(tree, ["preset", *SECTIONS], "")
    if not isinstance(tree["preset"], str):
        raise ConfigError(f"preset={tree['preset']!r} in the config is not a text")
    sections = {}
    for section, kind in SECTIONS.items():
        types = setting_types(kind)
        later = [name for name in _SINCE_FORMAT_1.get(section, ()) if written == 1]
        _check_keys(tree[section], [name for name in types if name not in later], f"{section}.")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in tree[section].items()}
        sections[section] = kind(**{name: checked(f"{section}.{name}", values[name], types[name]) for name in values})
    return Config(preset=tree["preset"], **sections)


def is_of_first_format(text: str) -> bool:
    """Whether a config that `from_json` reads was written by limoe 0.1.0.

    >>> is_of_first_format(to_json(preset("tiny")))
    False
    """
    return "format" not in json.loads(text)


def _check_keys(tree: Any, names: list[str], prefix: str) -> None:
    if not isinstance(tree, dict):
        raise ConfigError(f"the config holds {tree!r} where the settings {prefix}... should be")
    for name in tree:
        if name not in names:
            close = nearest(name, names)
            hint = f"; the nearest setting is {prefix}{close}" if close else ""
            raise ConfigError(f"the config has an unknown setting {prefix}{name}{hint}")
    missing = [prefix + name for name in names if name not in tree]
    if missing:
        raise ConfigError(f"the config lacks {', '.join(missing)}; was it written by another version?")


def differences(first: Config, second: Config) -> list[str]:
    """Dotted names of the settings in which two configs differ, in the order of the help.

    >>> differences(preset("tiny"), override(preset("tiny"), ["train.seed=1", "z=false"]))
    ['loss.z', 'train.seed']
    """
    names = [
        setting.name
        for setting in _SETTINGS.values()
        if getattr(getattr(first, setting.section), setting.field)
        != getattr(getattr(second, setting.section), setting.field)
    ]
    return ["preset"] * (first.preset != second.preset) + names


def both_values(names: Sequence[str], first: Config, second: Config, at_first: str, at_second: str) -> str:
    """The first few settings with the values that two configs give them, for a message; texts are quoted.

    >>> both_values(["train.seed"], preset("tiny"), override(preset("tiny"), ["train.seed=1"]), "there", "now")
    'train.seed (0 there, 1 now)'
    """
    listed = ", ".join(
        f"{name} ({_quoted(value_of(first, name))} {at_first}, {_quoted(value_of(second, name))} {at_second})"
        for name in names[:_VALUES_SHOWN]
    )
    return listed + f", and {len(names) - _VALUES_SHOWN} more" * (len(names) > _VALUES_SHOWN)


def value_of(config: Config, name: str) -> Any:
    """The value of the setting with a dotted name.

    >>> value_of(preset("tiny"), "model.depth")
    4
    """
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def settings_help(preset_name: str = "tiny") -> str:
    """A table of every setting: name, value in that preset, type and help.

    >>> print(settings_help().splitlines()[1])
    model.depth = 4  [integer]
    """
    config = preset(preset_name)
    lines = [f"Settings for --set, with their values in the preset {preset_name}:"]
    for setting in _SETTINGS.values():
        value = getattr(getattr(config, setting.section), setting.field)
        lines.append(f"{setting.name} = {_shown(value)}  [{type_name(setting.kind)}]")
        lines.append(f"    {setting.help}")
    return "\n".join(lines)


def _shown(value: object) -> str:
    """A value as `override` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "()"
    return str(value)


def _quoted(value: object) -> str:
    """A value in the middle of a sentence, where an empty text would not be seen."""
    return repr(value) if isinstance(value, str) else _shown(value)
