"""Batches: data in the forms that loaders give, as what a model is called with, and what follows it, such as labels."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxprune.errors import FxpruneError
from fxprune.graph.inputs import Bound, bind_inputs, is_kwargs
from fxprune.graph.signature import check_argument
from fxprune.graph.traced import ARGUMENTS, Mode, TracedModule, is_plain
from fxprune.progress import track_progress

Batch = tuple[Bound, Any]
FORMS = "a tensor, a dict of arguments, a tuple of arguments, (args, kwargs), or (one of these, labels)"


def read_batches(
    data: Any, model: nn.Module, error: type[FxpruneError], name: str, *, labelled: bool = False
) -> Iterator[Batch]:
    """The batches in ``data``: what ``model`` is called with, and the labels, or None where there are none.

    One batch, or an iterable of batches such as a DataLoader. Of a batch the model takes what it took in the example:
    the first entries of a tuple, or those of a dict with these names; the rest is the labels (of a dict its entry
    "labels", where it has one). What is no tensor in the
    example, such as use_cache=False, is as it was there. A tensor, a dict and a
    tuple are one batch, a list is several. With ``labelled`` a list of two, one of them a tensor, is a batch too, and
    pairs in a tuple are several.

    Args:
        data: the batches.
        model: traced.
        error: raised where there is none.
        name: of the bar on a terminal.
        labelled: whether each batch should have labels.
    """
    if not isinstance(data, Iterable):
        raise error(f"data must be a batch or an iterable of batches, such as a DataLoader; got {data!r:.60}")
    given = taken_arguments(model)
    names = None if given is None else [name for name, value in given.items() if value is ...]
    constants = {name: value for name, value in (given or {}).items() if value is not ...}
    for batch in track_progress([data] if is_batch(data, labelled) else data, name):
        bound, labels = read_batch(batch, names)
        if labelled and labels is None and not isinstance(batch, Mapping):
            raise error(
                f"data must have labels: a batch is (x, y), or a dict with more than the model takes; got a "
                f"{type(batch).__name__} in it"
            )
        yield (bound[0], constants | bound[1]), labels


def is_batch(data: Any, labelled: bool) -> bool:
    """Whether ``data`` is one batch."""
    if labelled and isinstance(data, list):
        return is_pair(data) and any(isinstance(part, Tensor) for part in data)
    if labelled and isinstance(data, tuple):
        return not all(map(is_pair, data))
    return isinstance(data, Tensor | tuple | Mapping)


def is_pair(value: Any) -> bool:
    """Whether ``value`` looks like (x, y)."""
    return isinstance(value, (tuple, list)) and len(value) == 2


def read_batch(batch: Any, names: list[str] | None) -> Batch:
    """What a model that takes arguments of these names is called with, and what follows that in a batch."""
    if isinstance(batch, Mapping):
        taken = {name: value for name, value in batch.items() if names is None or name in names}
        rest = {name: value for name, value in batch.items() if name not in taken}
        return ((), taken), rest.get("labels", unpack_labels(list(rest.values())))
    if not isinstance(batch, (tuple, list)) or not batch:
        return bind_inputs(batch), None
    if is_call(batch, names):
        (_, kwargs), labels = read_batch(batch[1], names)
        return (tuple(batch[0]), kwargs), labels
    count = len(batch) if names is None else max(1, len(names))
    if isinstance(batch[0], Mapping) or (isinstance(batch[0], (tuple, list)) and is_several(batch[0], count)):
        return read_batch(batch[0], names)[0], unpack_labels(batch[1:])
    return (tuple(batch[:count]), {}), unpack_labels(batch[count:])


def is_call(batch: Any, names: list[str] | None) -> bool:
    """Whether ``batch`` is (args, kwargs), and not arguments and a dict of labels."""
    if not (is_pair(batch) and isinstance(batch[0], (tuple, list)) and is_kwargs(batch[1])):
        return False
    return not batch[0] or names is None or not batch[1] or not batch[1].keys().isdisjoint(names)


def is_several(values: tuple[Any, ...] | list[Any], count: int) -> bool:
    """Whether ``values`` are arguments, ``count`` at most, and not one argument that is a list."""
    return isinstance(values, tuple) or count > 1


def unpack_labels(rest: Any) -> Any:
    """What follows the inputs in a batch: None, the one thing, or a tuple."""
    return None if not rest else rest[0] if len(rest) == 1 else tuple(rest)


def taken_arguments(model: nn.Module) -> dict[str, Any] | None:
    """The arguments that a traced model was given in its example, with ... for those with tensors; None if unknown."""
    if not isinstance(model, TracedModule):
        given: dict[str, Any] | None = getattr(model, "meta", {}).get(ARGUMENTS)
        return given
    taken: dict[str, Any] = {}
    for node in model.graphs[Mode.EVAL].nodes:
        if node.op == "placeholder":
            taken |= read_placeholder(node)
    return taken


def read_placeholder(node: fx.Node) -> dict[str, Any]:
    """What the example gave for a placeholder, by name: nothing where that is its default."""
    pattern = next((user.args[1] for user in node.users if user.target is check_argument), ...)
    name = str(node.target)
    if name.startswith("**"):
        return dict(pattern) if isinstance(pattern, Mapping) else {}
    if name.startswith("*"):
        return {f"{name}{at}": value for at, value in enumerate(pattern)} if isinstance(pattern, Sequence) else {}
    if node.args and pattern is not ... and pattern == node.args[0]:
        return {}
    return {name: pattern if is_plain(pattern) else ...}
