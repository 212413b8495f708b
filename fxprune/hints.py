"""Whether plain data are what a type hint says: for what was read from files."""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from fxprune.errors import FileError

LARGEST = 2**63  # of whole numbers, as torch has them
EXACT = 2**53  # of whole numbers in the place of fractions


def check_fields(kind: type[Any], values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Raise FileError for the first of ``values`` that is not what the dataclass ``kind`` says of its field.

    Args:
        kind: a dataclass. Where its hints can't be resolved, as those of a class within a function, nothing is checked.
        values: by the names in the file.
        names: of fields, by the names in the file where they differ.
    """
    if not isinstance(values, Mapping):
        raise FileError(f"{values!r:.60} stands where a {kind.__name__} should be: it is damaged")
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):
        return
    known = {part.name for part in fields(kind)}
    for name, value in values.items():
        field = (names or {}).get(name, name)
        if field in known and not fits_hint(value, hints[field]):
            raise FileError(f"{kind.__name__}.{field} is {value!r:.60}, which is damaged")


def fits_dataclass(kind: type[Any], values: Mapping[str, Any]) -> bool:
    """Whether ``values`` are the fields of the dataclass ``kind``, which stands within another one."""
    try:
        check_fields(kind, values)
    except FileError:
        return False
    return values.keys() <= {part.name for part in fields(kind)}


def fits_hint(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what ``hint`` says, as far as that can be told. True and False are no numbers."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits_hint(value, part) for part in parts)
    if hint is float:
        return type(value) is float or (type(value) is int and abs(value) <= EXACT)
    if hint is int:
        return type(value) is int and abs(value) < LARGEST
    if hint is None or hint is types.NoneType:
        return value is None
    kind = origin or hint
    if hint is Any:
        return True
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return fits_dataclass(hint, value)
    if not isinstance(kind, type) or kind is object:
        return True
    if issubclass(kind, Mapping):
        if not isinstance(value, Mapping):
            return False
        return not parts or all(fits_hint(k, parts[0]) and fits_hint(v, parts[1]) for k, v in value.items())
    if issubclass(kind, tuple) or (issubclass(kind, Sequence) and kind is not str):
        item = parts[0] if parts and (len(parts) == 1 or parts[1] is ...) else Any
        return isinstance(value, (list, tuple)) and all(fits_hint(part, item) for part in value)
    return isinstance(value, kind)
