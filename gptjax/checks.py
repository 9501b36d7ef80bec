"""Rules that the fields of several config sections share; `section` is empty for options of a verb.

Each raises `UserError` that names field, value and rule.
"""

import dataclasses

from gptjax.errors import UserError


def positive(section: str, config, *names: str) -> None:
    """Refuses fields below 1 (or not above 0)."""
    for name in names:
        if getattr(config, name) <= 0:
            raise UserError(f"{_full(section, name)}={getattr(config, name)} must be at least 1")


def not_negative(section: str, config, *names: str) -> None:
    """Refuses fields below 0."""
    for name in names:
        if getattr(config, name) < 0:
            raise UserError(f"{_full(section, name)}={getattr(config, name)} must not be negative")


def fraction(section: str, config, *names: str) -> None:
    """Refuses fields outside [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{_full(section, name)}={getattr(config, name)} must lie in [0, 1)")


def no_effect(section: str, config, name: str, active: bool, needs: str) -> None:
    """Refuses an option that was changed from its default where it does nothing."""
    default = next(field.default for field in dataclasses.fields(config) if field.name == name)
    if not active and getattr(config, name) != default:
        value = getattr(config, name)
        raise UserError(f"{_full(section, name)}={value!r} has no effect without {needs}; leave it at {default!r}")


def _full(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
