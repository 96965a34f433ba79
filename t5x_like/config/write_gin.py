"""A model config as a gin file, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_state

from t5x_like.config import gin_config
from t5x_like.errors import UserError

# Macros that recipes set -> the field that they stand for.
_MACROS = {
    "VOCAB_SIZE": "vocab_size",
    "DROPOUT_RATE": "dropout_rate",
    "DTYPE": "dtype",
    "REMAT": "remat",
}


def model_text(config: Any, *, comment: str) -> str:
    """A gin file whose macro MODEL builds an object that equals `config`.

    Every field is written, so that the file means the same when a default changes. Where a class
    has several instances in `config`, each has a scope, named after its place.

    Args:
      config: a frozen dataclass whose fields hold literals, further such dataclasses, and tuples
        of either.
      comment: one line at the top.
    """
    names = _names(config)
    macros = {macro: value for macro, field in _MACROS.items() if (value := _common(names, field))}
    modules = sorted({type(instance).__module__ for instance in names})
    lines = [f"# {comment}", "from __gin__ import dynamic_registration", ""]
    lines += [f"from {m.rpartition('.')[0]} import {m.rpartition('.')[2]}" for m in modules]
    lines += ["", *(f"{macro} = {value[0]!r}" for macro, value in macros.items())]
    lines += ["", f"MODEL = @{names[config]}()"]
    by_field = {field: f"%{macro}" for macro, field in _MACROS.items() if macro in macros}
    for instance, name in names.items():
        lines += ["", f"{name}:"]
        for field in dataclasses.fields(instance):
            value = getattr(instance, field.name)
            lines.append(f"  {field.name} = {by_field.get(field.name) or _value(value, names)}")
    return "\n".join(lines) + "\n"


def _names(config: Any) -> dict[Any, str]:
    """Each different instance in `config`, itself first -> `scope/module.Class`."""
    places: dict[Any, str] = {}
    for instance, place in _instances(config, ""):
        places.setdefault(instance, place)
    names = {}
    for instance, place in places.items():
        cls = type(instance)
        several = sum(type(other) is cls for other in places) > 1
        selector = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
        names[instance] = f"{place}/{selector}" if several else selector
    return names


def _instances(value: Any, place: str) -> Iterator[tuple[Any, str]]:
    """Yields (dataclass instance, `field_field_index` that leads to it), outer ones first."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _instances(item, f"{place}_{i}")
    elif dataclasses.is_dataclass(value):
        yield value, place.lstrip("_")
        for field in dataclasses.fields(value):
            yield from _instances(getattr(value, field.name), f"{place}_{field.name}")


def _common(names: dict[Any, str], field: str) -> tuple[Any] | None:
    """The value that all instances with this field have, in a tuple; None if they differ."""
    values = {getattr(i, field) for i in names if hasattr(i, field)}
    return (values.pop(),) if len(values) == 1 else None


def _value(value: Any, names: dict[Any, str]) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_value(item, names) for item in value)}{',' * (len(value) == 1)})"
    return f"@{names[value]}()" if dataclasses.is_dataclass(value) else repr(value)


def build_model(gin_file: str | Path) -> Any:
    """The object that a gin file's macro MODEL stands for; `parse`'s former state is lost.

    Raises:
      UserError: what `gin_config.parse` says; no MODEL, or one that is no `@Class()`.
    """
    config = gin_config.parse([str(gin_file)])
    reference = gin_state._CONFIG.get(("MODEL", "gin.macro"), {}).get("value")
    if not isinstance(reference, gin_state.ConfigurableReference) or not reference.evaluate:
        raise UserError(
            f"'{gin_file}' defines no MODEL = @some.ModelConfig(); give a gin file that does, "
            "such as gin/models/t5_1_1/small.gin."
        )
    # As `%MODEL` does it: a reference without scopes is called in the scope of the macro.
    with gin.config_scope(list(reference.scopes) or ["MODEL"]):
        return config.build(reference.configurable.wrapped)
