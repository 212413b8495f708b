"""Save and load a compact model: one safetensors file with the weights and, as JSON, the plan. No pickle.

Of a model from ``fxprune.initialize`` the file has the seed, and only the weights that differ from what it gives; of
convolutions whose kernels have many zeros, only the weights that are not zero.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.atomic import replace_file
from fxprune.channels.analysis import analyze
from fxprune.errors import FileError, FxpruneError, require_type
from fxprune.files import kernels
from fxprune.files.sparse import pack_sparse, start_in, unpack_sparse
from fxprune.files.start import forget_start, remember_start, start_of
from fxprune.graph.inputs import imagine_inputs, map_tensors
from fxprune.graph.trace import trace, unwrap_model
from fxprune.graph.traced import Model, copy_model
from fxprune.plan import Plan
from fxprune.rewrite.rewrite import rewrite

FORMAT = "fxprune model 1"
EXAMPLE = "example_inputs/"  # names of tensors that are not the model's: those that its plain Python was run on


def save(compact: nn.Module, path: str | Path) -> None:
    """Write a model that ``rewrite``, ``prune`` or ``initialize`` returned. The file appears whole or not at all.

    Raises:
        FileError: the model did not come from fxprune, so there is neither a plan nor a seed to write; or nothing can
            be written there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    require_type(compact, nn.Module, "compact", FileError)
    compact = unwrap_model(compact)
    start = start_of(compact)
    record = {} if start and start.fits(compact) and not record_of(compact) else require_record(compact)
    state = {name: tensor.detach() for name, tensor in compact.state_dict().items()}
    state, aliases = without_aliases(state)
    state, sparse = pack_sparse(state, start)
    state, patterned = kernels.pack_kernels(state)
    state |= {f"{EXAMPLE}{number}": tensor for number, tensor in enumerate(record.get("example", ()))}
    with replace_file(path, "a model") as partial:
        try:
            description = describe_model(record, aliases, sparse, patterned)
            contents = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(contents, partial, {"fxprune": json.dumps(description)})
        except (SafetensorError, TypeError) as error:
            raise FileError(f"can't write a model to {path}: {error}") from error
        partial.chmod(0o666 & ~current_umask())  # safetensors lets nobody else read it


def record_of(compact: nn.Module) -> dict[str, Any]:
    """What ``rewrite`` left on the compact model; nothing where it made none."""
    record: dict[str, Any] = getattr(compact, "meta", {}).get("fxprune", {})
    return record


def require_record(compact: nn.Module) -> dict[str, Any]:
    """The same. Raises FileError where there is none."""
    if record := record_of(compact):
        return record
    raise FileError(
        f"this {type(compact).__name__} has no plan: only models that fxprune.rewrite, fxprune.prune or "
        "fxprune.initialize returned can be saved. Save the state_dict of others with safetensors."
    )


def describe_model(
    record: Mapping[str, Any], aliases: Mapping[str, str], start: Any = None, patterned: Sequence[Any] = ()
) -> dict[str, Any]:
    """What a file says of its model, beside the tensors: plain data."""
    known = {key: record[key] for key in ("plan", "example_inputs") if key in record}
    return {"format": FORMAT, "aliases": dict(aliases), "start": start, "kernels": [*patterned], **known}


def current_umask() -> int:
    """The permissions that new files do not get. It can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def load(path: str | Path, model: nn.Module) -> Model:
    """Read a model that ``save`` wrote.

    Args:
        path: of the file.
        model: the dense model, built as it was before; its weights do not matter, they may be on the meta device. It is
            not changed.

    Returns:
        Where the model was cut, the compact GraphModule: ``model`` is traced and the plan carried out on it. Otherwise
        a copy of ``model``. The weights are those of the file, bit for bit.

    Raises:
        FileError: the file is truncated, is no such file, or belongs to another model. Nothing is changed.
    """
    require_type(path, (str, Path), "path", FileError)
    record, state = read_model(path)
    try:
        sparse = record.get("start") or {}
        start = start_in(sparse, unwrap_model(model)) if sparse else None
        if "plan" in record:
            plan = Plan.from_json(record["plan"])
            inputs = imagine_inputs(record["example_inputs"])
            example = [state.pop(name) for name in sorted(state, key=number_of) if name.startswith(EXAMPLE)]
            if example:
                remaining = iter(example)
                inputs = map_tensors(lambda _: next(remaining), inputs)
            graph = trace(model, inputs)
            compact, param_map = rewrite(graph, analyze(graph, inputs, **plan.options), plan)
            start = start and start.after(param_map)
        else:
            compact = copy_model(unwrap_model(model))
        state = kernels.unpack_kernels(state, record.get("kernels", []), compact.state_dict())
        if start is not None:
            state = unpack_sparse(state, sparse, start)
            remember_start(compact, start)
        else:
            forget_start(compact)
        state |= {name: state[first] for name, first in record["aliases"].items()}
        check_state(compact, state)
        on_meta = any(parameter.is_meta for parameter in compact.parameters())
        if on_meta:
            require_values(compact, state)
    except (FxpruneError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise FileError(f"{path} does not belong to this {type(model).__name__}: {error}") from error
    full_state = compact.state_dict()  # with the versions of the modules, which some look at when they load
    full_state.update(state)
    compact.load_state_dict(full_state, assign=on_meta)
    return compact


def require_values(compact: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise FileError where a buffer on the meta device gets no values from a file."""
    lacking = [name for name, buffer in compact.named_buffers() if buffer.is_meta and name not in state]
    if lacking:
        raise FileError(
            f"the buffer {lacking[0]} is on the meta device, and in no file: build the model with its parameters on "
            "meta only, such as within accelerate.init_empty_weights()"
        )


def number_of(name: str) -> int:
    """The place of an example's tensor among them."""
    end = name.removeprefix(EXAMPLE)
    return int(end) if end.isdigit() else -1


def read_model(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of the model and the tensors in a file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get("fxprune", "null"))
            if not isinstance(record, dict) or record.get("format") != FORMAT:
                raise FileError(f"{path} is a safetensors file, but not one that fxprune.save wrote ({FORMAT!r})")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise FileError(
            f"can't read a model from {path}: {error}. Is it truncated, or another kind of file?"
        ) from error
    return record, state


def without_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share memory under several names once; and the other names."""
    first: dict[tuple[int, torch.Size], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return {name: tensor for name, tensor in state.items() if name not in aliases}, aliases


def check_state(compact: nn.Module, state: dict[str, Tensor]) -> None:
    """Raise FileError unless ``state`` fits the compact model exactly."""
    expected = compact.state_dict()
    for name in [*expected, *state]:
        if name not in state or name not in expected:
            raise FileError(f"{name} is only in {'the file' if name in state else 'the model'}")
        file_kind, model_kind = ((*tensor.shape, tensor.dtype) for tensor in (state[name], expected[name]))
        if file_kind != model_kind:
            raise FileError(
                f"{name} is {describe_tensor(state[name])} in the file, {describe_tensor(expected[name])} in the model"
            )


def describe_tensor(tensor: Tensor) -> str:
    """A tensor's dtype and shape, as "float32[64, 3, 7, 7]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
