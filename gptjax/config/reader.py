"""Config dataclasses ⇄ YAML ⇄ command-line flags, read strictly: an option that would be ignored is an error."""

import dataclasses
import functools
import math
import re
import reprlib
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from gptjax.config.run import Config
from gptjax.config.synonyms import meant_option, suggest_option
from gptjax.errors import UserError, did_you_mean

T = TypeVar("T")
_FLAG = re.compile(r"--[A-Za-z]")
LARGEST_FLOAT = 3e38
"""Largest float: devices compute in float32."""


def from_dict(cls: type[T], raw: dict, where: str, prefix: str = "") -> T:
    """Builds the config dataclass `cls` from nested plain values; missing keys keep their default.

    Args:
        cls: A config dataclass.
        raw: Values as read from YAML, flags or a checkpoint.
        where: Name of the source, for the error message ("configs/tiny.yaml").
        prefix: Dotted path of `cls` in the whole config.

    Raises:
        UserError: A key is not a field of `cls`, a value does not have the field's type, or a rule is broken.
    """
    return _build(cls, _checked(cls, raw, where, prefix), where)


def load_config(path: str | Path, overrides: dict | None = None) -> Config:
    """Reads a YAML file; `overrides` (nested values of `read_flags`) take precedence.

    Raises:
        UserError: The file is missing or is no YAML mapping, or a value is not allowed.
    """
    return make_config(read_yaml(Path(path)), overrides or {}, str(path))


def make_config(values: dict, overrides: dict, where: str) -> Config:
    """Builds a config from nested `values`, which come from `where`; nested `overrides` take precedence.

    Raises:
        UserError: A key is unknown, or a value is not allowed.
    """
    checked = _checked(Config, values, where, "")
    return _build(Config, merged(checked, _checked(Config, overrides, "command line", "")), where)


def read_yaml(path: Path) -> dict:
    """Reads one mapping with the safe loader.

    Raises:
        UserError: The file does not exist, is not UTF-8 or YAML, has a key twice, or is no mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise UserError(f"{path}: no such config file.{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (LookupError, TypeError, AttributeError):  # PyYAML reads `!!int ""` and the like without a check
        raise UserError(f"{path}: not valid YAML: a value is not of the kind that its !!tag names") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold `key: value` lines, not a {type(raw).__name__}")
    return raw


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which also rejects duplicate keys."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_flags(cls: type, args: Sequence[str]) -> dict:
    """Converts `--section.key VALUE`, `--section.key=VALUE` and, for lists, `--key A B C` to nested values.

    The value of a boolean flag may be omitted: `--merge` is `--merge true`. If a flag is given twice, the last value is
    used; values of lists are concatenated, and `[]` empties a list.

    Raises:
        UserError: A flag is unknown (the message suggests one), a value is missing, or a word belongs to no flag.
    """
    flags = flag_types(cls)
    nested: dict = {}
    lists: dict[str, list[str]] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not is_flag(word):
            raise UserError(f"command line: unexpected {word!r}; options are --section.key VALUE")
        name, has_value, value = word[2:].partition("=")
        if name not in flags:
            raise UserError(
                f"command line: unknown option --{name}.{suggest_option(name, flags)} --help lists them all."
            )
        values = [value] if has_value else []
        if not has_value and flags[name] is bool and (not rest or rest[0].lower() not in ("true", "false")):
            values = ["true"]
        elif not has_value:
            many = _is_list(flags[name])
            while rest and not is_flag(rest[0]) and (many or not values):
                values.append(rest.pop(0))
        if not values:
            hint = f"; one that begins with -- is given as --{name}={rest[0]}" if rest else ""
            raise UserError(f"command line: --{name} needs a value{hint}")
        if _is_list(flags[name]):
            lists[name] = [] if values == ["[]"] else lists.get(name, []) + values
        set_option(nested, name, lists[name] if _is_list(flags[name]) else _from_text(flags[name], values[0]))
    return nested


def is_flag(word: str) -> bool:
    """Whether a word of the command line is a flag; "--- a" and "-- b" are values."""
    return _FLAG.match(word) is not None


@functools.cache
def flag_types(cls: type, prefix: str = "") -> dict[str, type]:
    """Maps every dotted field name of `cls` to its type."""
    flags = {}
    for name, field_type in _types(cls).items():
        if _is_sections(field_type):
            continue
        if dataclasses.is_dataclass(field_type):
            flags |= flag_types(field_type, f"{prefix}{name}.")
        else:
            flags[prefix + name] = field_type
    return flags


def to_dict(config) -> dict:
    """Nested plain values of a config, with lists instead of tuples. Inverse of `from_dict`."""
    return {
        field.name: to_dict(value)
        if dataclasses.is_dataclass(value)
        else [to_dict(item) if dataclasses.is_dataclass(item) else item for item in value]
        if type(value) is tuple
        else value
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def to_yaml(config) -> str:
    """YAML with every field, in order. Inverse of `load_config`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def differing_fields(old, new) -> dict[str, tuple]:
    """Maps the dotted name of each field that differs to `(old value, new value)`."""
    old_flat, new_flat = to_flat(old), to_flat(new)
    return {name: (old_flat[name], new_flat[name]) for name in new_flat if old_flat[name] != new_flat[name]}


def to_flat(config) -> dict[str, Any]:
    """Maps the dotted name of each field to its plain value."""
    return flatten(to_dict(config))


def flatten(nested: dict, prefix: str = "") -> dict:
    """Maps dotted names to values."""
    flat = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@functools.cache
def _types(cls: type) -> dict[str, type]:
    return typing.get_type_hints(cls)


def _is_sections(field_type) -> bool:
    """Whether a field is a list of sections, which only files can set."""
    return _is_list(field_type) and dataclasses.is_dataclass(typing.get_args(field_type)[0])


def _is_list(field_type) -> bool:
    return typing.get_origin(field_type) is tuple


def _type_name(field_type) -> str:
    if typing.get_origin(field_type) is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(field_type))
    if _is_list(field_type):
        return "a list of numbers" if typing.get_args(field_type)[0] is float else "a list of text"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[field_type]


def _checked(cls: type, raw: dict, where: str, prefix: str) -> dict:
    """Returns `raw` with every key known and every value of its field's type."""
    types = _types(cls)
    values = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if key not in types:
            section = f" in section {prefix[:-1]!r}" if prefix else ""
            near = _suggest_key(str(key), types, prefix)
            raise UserError(f"{where}: unknown key {name!r}{section}.{near} Valid keys: {', '.join(types)}.")
        if dataclasses.is_dataclass(types[key]):
            values[key] = _checked_section(types[key], value, where, name)
        elif _is_sections(types[key]):
            if not isinstance(value, (list, tuple)):
                raise UserError(f"{where}: {name} is a list of sections, not {_shown(value)}")
            [section] = typing.get_args(types[key])[:1]
            values[key] = tuple(_checked_section(section, v, where, f"{name}[{n}]") for n, v in enumerate(value))
        else:
            values[key] = _coerce(types[key], value, f"{where}: {name}")
    return values


def _checked_section(cls: Any, value: Any, where: str, name: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {name} is a section of keys, not {_shown(value)}")
    return _checked(cls, value, where, f"{name}.")


def _suggest_key(key: str, types: Collection[str], prefix: str) -> str:
    """Suggests a key: without the section's name if it is in this section, otherwise with it."""
    section = re.sub(r"^parts\[\d+\]\.", "", prefix)
    meant = meant_option(f"{section}{key}", flag_types(Config))
    if meant in flag_types(Config):
        return f" Did you mean {meant.removeprefix(section)!r}?"
    return f" {meant}" if meant else did_you_mean(key, types)


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 100
_SHOWN.maxlevel = 2


def _shown(value) -> str:
    """A value for an error message, shortened if it is long."""
    return _SHOWN.repr(value)


def _coerce(field_type, value, what: str):
    if _is_list(field_type):
        items = [value] if isinstance(value, str) else value
        kind = typing.get_args(field_type)[0]
        if isinstance(items, (list, tuple)) and kind is float:
            return tuple(_coerce(float, item, what) for item in items)
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(items)
    elif typing.get_origin(field_type) is Literal:
        options = typing.get_args(field_type)
        if isinstance(value, str) and value in options:
            return value
        near = did_you_mean(value, options) if isinstance(value, str) and len(value) < 100 else ""
        raise UserError(f"{what}={_shown(value)} must be {_type_name(field_type)}.{near}")
    elif field_type is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as text, so numbers may arrive as text
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if abs(number) > LARGEST_FLOAT:
            raise UserError(f"{what}={_shown(value)} is too large")
        if math.isfinite(number):
            return number
    elif type(value) is field_type:
        if field_type is int and abs(value) >= 2**63:
            raise UserError(f"{what}={_shown(value)} is too large")
        return value
    raise UserError(f"{what}={_shown(value)} must be {_type_name(field_type)}")


def _from_text(field_type, text: str):
    """Converts a flag's text to the value that YAML would give."""
    if field_type is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if field_type is int:
        try:
            return int(text)
        except ValueError:
            return text
    return text


def _build(cls: type, values: dict, where: str):
    types = _types(cls)
    missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in values]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing")
    try:
        return cls(**{key: _built(types[key], value, where) for key, value in values.items()})
    except UserError as error:
        raise error if str(error).startswith(f"{where}: ") else UserError(f"{where}: {error}", error.unused) from None


def _built(field_type: Any, value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return _build(field_type, value, where)
    if _is_sections(field_type):
        return tuple(_build(typing.get_args(field_type)[0], item, where) for item in value)
    return value


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def merged(base: dict, over: dict) -> dict:
    """Nested options, in which those of `over` replace those of `base`."""
    found = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        found[key] = merged(base[key], value) if both else value
    return found


def set_option(nested: dict, name: str, value: Any) -> None:
    """Sets the option with a dotted name in nested options."""
    *sections, key = name.split(".")
    for section in sections:
        nested = nested.setdefault(section, {})
    nested[key] = value
