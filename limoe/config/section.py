"""What a setting is: its help, default and type, and how a section of them is checked when it is built."""

import math
from collections.abc import Iterator
from dataclasses import field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from limoe.errors import LimoeError


class Choices:
    """The names that a setting takes. A program may add one of its own, together with what it stands for.

    >>> choices = Choices("red", "green")
    >>> choices.add("blue")
    >>> type_name(choices), fits("blue", choices), fits("grey", choices)
    ('red | green | blue', True, False)
    """

    def __init__(self, *names: str) -> None:
        self._names = list(names)

    def add(self, name: str) -> None:
        """Take one more name; raises ValueError for one that is taken already."""
        if name in self._names:
            raise ValueError(f"{name!r} is one of {', '.join(self._names)} already; take another name")
        self._names.append(name)

    def remove(self, name: str) -> None:
        """Take out a name that was added."""
        self._names.remove(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)


class ConfigError(LimoeError, ValueError):
    """A setting is unknown, ill-typed or does not fit the others; the message says which one and what to do."""


def setting(help: str, default: Any = None, *, required: bool = False, choices: Choices | None = None) -> Any:
    """A dataclass field with its help text (units and meaning of special values); required ones come from a preset."""
    metadata = {"help": help, "choices": choices}
    return field(metadata=metadata) if required else field(default=default, metadata=metadata)


def type_name(kind: Any) -> str:
    """The type of a setting as shown to a person.

    >>> type_name(Literal["keep", "mask"]), type_name(tuple[int, ...]), type_name(float)
    ('keep | mask', 'integers like 1,3 or ()', 'number')
    """
    if names := names_of(kind):
        return " | ".join(names)
    if get_origin(kind) is tuple:
        return "integers like 1,3 or ()"
    return {int: "integer", float: "number", bool: "true | false", str: "text"}[kind]


def names_of(kind: Any) -> tuple[str, ...]:
    """The names that a setting of this type takes; none where it is not a matter of names."""
    if isinstance(kind, Choices):
        return tuple(kind)
    return get_args(kind) if get_origin(kind) is Literal else ()


def fits(value: object, kind: Any) -> bool:
    """Whether a value has the type of a setting (a bool is not an integer; floats are finite)."""
    if isinstance(kind, Choices) or get_origin(kind) is Literal:
        return value in names_of(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(item, int) for item in value)
    if kind is float:
        return isinstance(value, float) and math.isfinite(value)
    return type(value) is kind


def checked(name: str, value: object, kind: Any) -> Any:
    """The value of the setting with that dotted name, a whole number made a float where a float is due.

    Raises ConfigError when the value has not the setting's type.

    >>> checked("optimizer.learning_rate", 1, float)
    1.0
    """
    if kind is float and type(value) is int:
        return float(value)  # 1 and 1.0 are one setting: equal JSON
    if not fits(value, kind):
        raise ConfigError(f"{name}={value!r} is not of the right type; use {type_name(kind)}")
    return value


def setting_types(section: type) -> dict[str, Any]:
    """The type of each setting of a section, in the order of the fields.

    >>> from limoe.config.schema import TrainConfig
    >>> setting_types(TrainConfig)["accumulation"]
    <class 'int'>
    """
    hints = get_type_hints(section)
    return {f.name: f.metadata["choices"] or hints[f.name] for f in fields(section)}


class Section:
    """What the sections share: the check of each field's type, and requirements with a message."""

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
