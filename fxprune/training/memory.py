"""Memory: what a training pass remembers in one run, a dataclass of the pass's own. Here is what is done with any."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any

from fxprune.errors import FileError, SessionError
from fxprune.hints import check_fields


@dataclass(slots=True)
class Memory:
    """Of a pass that remembers nothing."""


def derived_field(make: Callable[[], Any] | None = None) -> Any:
    """A field that follows from the model: ``prepare`` sets it anew after every cut, and it is never saved.

    Args:
        make: gives its value until then; without it there is none.
    """
    if make is None:
        return field(init=False, repr=False, compare=False, metadata={"derived": True})
    return field(init=False, repr=False, compare=False, metadata={"derived": True}, default_factory=make)


def check_memory(owner: object, memory: object) -> None:
    """Raise SessionError unless ``memory``, which the pass ``owner`` begins with, can be kept, saved and put back."""
    if not is_dataclass(memory) or isinstance(memory, type) or memory.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise SessionError(
            f"{type(owner).__name__}.begin must return what the pass remembers, a dataclass that is not frozen; it "
            f"returned {memory!r:.60}"
        )


def saved_fields(memory: Any) -> dict[str, Field[Any]]:
    """The fields that go into checkpoints, by the name that they have there: ``lambda_`` is "lambda"."""
    return {part.name.removesuffix("_"): part for part in fields(memory) if "derived" not in part.metadata}


def saved_values(memory: Any) -> dict[str, Any]:
    """What goes into a checkpoint: the saved fields, but for those that are None, as they are at first.

    Raises:
        FileError: the memory has an attribute that is no field, which would be lost.
    """
    stray = getattr(memory, "__dict__", {}).keys() - {part.name for part in fields(memory)}
    if stray:
        raise FileError(
            f"{type(memory).__name__}.{min(stray)} is no field of what the pass remembers, so it would be lost: give "
            "the dataclass that field"
        )
    values = {name: (getattr(memory, part.name), part.default) for name, part in saved_fields(memory).items()}
    return {name: value for name, (value, default) in values.items() if not (value is None and default is None)}


def check_values(memory: Any, values: Mapping[str, Any]) -> None:
    """Raise FileError where ``values``, of a checkpoint, are not what the fields of ``memory`` hold."""
    unknown = sorted(values.keys() - saved_fields(memory).keys())
    if unknown:
        raise FileError(
            f"it remembers {', '.join(unknown)}, for which {type(memory).__name__} has no field: it is of another "
            "version of this pass. Load it with that one"
        )
    check_fields(type(memory), values, {name: part.name for name, part in saved_fields(memory).items()})


def load_values(memory: Any, values: Mapping[str, Any]) -> None:
    """Put back what ``saved_values`` returned. A field that a file does not have yet stays as the pass began it."""
    for name, part in saved_fields(memory).items():
        if name in values or part.default is None:
            setattr(memory, part.name, values.get(name))


def held_values(memory: Any) -> dict[str, Any]:
    """All fields that have a value now, as they are."""
    return {part.name: getattr(memory, part.name) for part in fields(memory) if hasattr(memory, part.name)}


def restore_values(memory: Any, held: Mapping[str, Any]) -> None:
    """Undo every assignment since ``held_values``."""
    for part in fields(memory):
        if part.name in held:
            setattr(memory, part.name, held[part.name])
        elif hasattr(memory, part.name):
            delattr(memory, part.name)


@contextmanager
def kept_memories(memories: Sequence[Any]) -> Iterator[None]:
    """Every assignment to ``memories`` within the block is undone where it fails."""
    held = [held_values(memory) for memory in memories]
    try:
        yield
    except BaseException:
        for memory, values in zip(memories, held, strict=True):
            restore_values(memory, values)
        raise


def forget_derived(memory: Any) -> None:
    """Make the derived fields as they are before ``prepare``."""
    for part in fields(memory):
        if "derived" not in part.metadata:
            continue
        if part.default_factory is not MISSING:
            setattr(memory, part.name, part.default_factory())
        elif hasattr(memory, part.name):
            delattr(memory, part.name)
