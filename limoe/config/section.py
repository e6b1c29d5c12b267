"""Settings and sections of settings: help, default and type of a setting, and the checks of a section."""

import math
from dataclasses import field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from limoe.errors import LimoeError


class ConfigError(LimoeError, ValueError):
    """A setting is unknown, has a wrong type or does not fit the others. The message says which, and what to do."""


def setting(help: str, default: Any = None, *, required: bool = False, choices: list[str] | None = None) -> Any:
    """Make a dataclass field with a help text, which gives units and special values. Presets give required ones.

    `choices` are the allowed names, if they may grow while the program runs; else the annotation has them.
    """
    metadata = {"help": help, "choices": choices}
    return field(metadata=metadata) if required else field(default=default, metadata=metadata)


def type_name(kind: Any) -> str:
    """Describe the type of a setting to a user.

    >>> type_name(Literal["keep", "mask"]), type_name(tuple[int, ...]), type_name(float)
    ('keep | mask', 'integers like 1,3 or ()', 'number')
    """
    if names := names_of(kind):
        return " | ".join(names)
    if get_origin(kind) is tuple:
        return "integers like 1,3 or ()"
    return {int: "integer", float: "number", bool: "true | false", str: "text"}[kind]


def names_of(kind: Any) -> tuple[str, ...]:
    """List the names that a setting of this type may have; none if it is not one of several names."""
    return tuple(kind) if isinstance(kind, list) else get_args(kind) if get_origin(kind) is Literal else ()


def fits(value: object, kind: Any) -> bool:
    """Say whether a value has the type of a setting. A bool is not an integer, and a float must be finite."""
    if names := names_of(kind):
        return value in names
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(item, int) for item in value)
    if kind is float:
        return isinstance(value, float) and math.isfinite(value)
    return type(value) is kind


def checked(name: str, value: object, kind: Any) -> Any:
    """Check the type of the value of a setting with a dotted name, and convert an integer to float if required.

    Raises ConfigError for a value of another type.

    >>> checked("optimizer.learning_rate", 1, float)
    1.0
    """
    if kind is float and type(value) is int:
        return float(value)  # 1 and 1.0 are one setting: equal JSON
    if not fits(value, kind):
        raise ConfigError(f"{name}={value!r} is not of the right type; use {type_name(kind)}")
    return value


def setting_types(section: type) -> dict[str, Any]:
    """Map the settings of a section to their types, in the order of the fields.

    >>> from limoe.config.schema import TrainConfig
    >>> setting_types(TrainConfig)["accumulation"]
    <class 'int'>
    """
    hints = get_type_hints(section)
    return {f.name: f.metadata["choices"] or hints[f.name] for f in fields(section)}


class Section:
    """Base class of sections: checks the type of each field, and gives failed requirements a message."""

    section: str

    def __post_init__(self) -> None:
        for name, kind in setting_types(type(self)).items():
            object.__setattr__(self, name, checked(f"{self.section}.{name}", getattr(self, name), kind))
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    def _require(self, holds: bool, name: str, advice: str) -> None:
        if not holds:
            raise ConfigError(f"{self.section}.{name}={getattr(self, name)!r}: {advice}")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) > 0, name, "must be positive")

    def _require_not_negative(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) >= 0, name, "must not be negative")

    def _require_below_one(self, *names: str) -> None:
        for name in names:
            self._require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
