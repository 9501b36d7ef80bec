"""The values of Arrow columns, with strings that need not be valid UTF-8."""

from collections.abc import Callable
from typing import Any


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of strings."""
    import pyarrow

    types = pyarrow.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def cells_of(column: Any) -> list[Any]:
    """The values of an Arrow column. Arrow does not check that its strings are UTF-8, so they come as bytes."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _has_text(column.type):
        column, decode = column.cast(_with_binary(column.type)), _decoder(column.type)
        return [decode(value) for value in column.to_pylist()]
    return column.to_pylist()


def _has_text(kind: Any) -> bool:
    return is_text(kind) or any(_has_text(kind.field(n).type) for n in range(kind.num_fields))


def _with_binary(kind: Any) -> Any:
    """An Arrow type with bytes in place of strings, in lists and structs too."""
    import pyarrow

    if is_text(kind):
        return pyarrow.large_binary()
    if pyarrow.types.is_struct(kind):
        fields = [kind.field(n) for n in range(kind.num_fields)]
        return pyarrow.struct([field.with_type(_with_binary(field.type)) for field in fields])
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_with_binary(kind.value_type)))
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_with_binary(kind.value_type)))
    return kind


def _decoder(kind: Any) -> Callable[[Any], Any]:
    """Returns the function that decodes the values of a column of type `_with_binary(kind)`."""
    import pyarrow

    if is_text(kind):
        return lambda value: None if value is None else value.decode("utf-8", "surrogateescape")
    if pyarrow.types.is_struct(kind):
        inner = {kind.field(n).name: _decoder(kind.field(n).type) for n in range(kind.num_fields)}
        return lambda value: value and {name: decode(value[name]) for name, decode in inner.items()}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        item = _decoder(kind.value_type)
        return lambda value: value and [item(element) for element in value]
    return lambda value: value
