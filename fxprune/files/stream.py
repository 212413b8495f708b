"""Weights go through a cut from file to file, a tensor at a time: the model is never whole in memory."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.atomic import replace_file
from fxprune.channels.analysis import abridge_list
from fxprune.errors import FileError, require_type
from fxprune.files.model import describe_model, require_record
from fxprune.graph.traced import Model, require_traced
from fxprune.progress import track_progress
from fxprune.rewrite.param_map import ParamMap

Shape = tuple[int, ...]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of safetensors, which is opened when it is read.

    Attributes:
        path: of the file.
        name: in the file.
        dtype: as safetensors writes it, such as "BF16".
        shape: of it.
    """

    path: Path
    name: str
    dtype: str
    shape: Shape

    def read(self) -> Tensor:
        """The tensor. Its file is closed again, so that memory does not hold what was read before."""
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor

    def count_bytes(self, shape: Shape) -> int:
        """Bytes of a tensor of this dtype."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(shape) * (int(bits[0]) // 8 if bits else 1)


def cut_weights(graph: Model, compact: Model, param_map: ParamMap, source: str | Path, target: str | Path) -> None:
    """Cut the weights in ``source`` as a rewrite cut their model, and write them to ``target``.

    For models that are too large to be in memory twice: trace, plan and rewrite the model on the meta device, then cut
    its file. One tensor at a time is in memory. The new file has the names and the dtypes of the old one. It is read by
    ``fxprune.load``, and by whatever reads safetensors.

    Args:
        graph: the traced model, as it was cut. No values are looked at: it may be on the meta device.
        compact: what ``rewrite`` made of it.
        param_map: that ``rewrite`` returned with it.
        source: a file of safetensors, an index of several (``model.safetensors.index.json``), or a folder with one of
            these, as ``save_pretrained`` of Hugging Face writes it.
        target: the new file. It appears whole or not at all.

    Raises:
        FileError: ``source`` has other weights than this model, the rest does not belong together, or something can
            not be read or written.
    """
    require_traced(graph, "graph", FileError)
    require_traced(compact, "compact", FileError)
    require_type(param_map, ParamMap, "param_map", FileError)
    record = require_record(compact)
    if "example" in record:
        raise FileError("plain Python steers this model, and its example is part of its file: use fxprune.save")
    aliases = find_aliases(compact)
    shapes = {name: tuple(tensor.shape) for name, tensor in compact.state_dict().items() if name not in aliases}
    check_map(graph, shapes, param_map)
    chosen = choose_stored(list_tensors(source), [*shapes], aliases, param_map, source)
    check_shapes(chosen, graph, source)
    with replace_file(target, "weights") as partial, partial.open("wb") as file:
        file.write(make_header(chosen, shapes, describe_model(record, aliases)))
        for name in track_progress(list(shapes), "cutting"):
            file.write(to_bytes(param_map.slice(name, chosen[name].read())))


def list_tensors(source: str | Path) -> dict[str, StoredTensor]:
    """The tensors in a file, in the files of an index, or in a folder, by name; none is read.

    Raises:
        FileError: there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    require_type(source, (str, Path), "source", FileError)
    stored: dict[str, StoredTensor] = {}
    for path in list_files(Path(source)):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    view = file.get_slice(name)
                    stored[name] = StoredTensor(path, name, view.get_dtype(), tuple(view.get_shape()))
        except (OSError, SafetensorError) as error:
            raise FileError(f"can't read weights from {path}: {error}. Is it a file of safetensors?") from error
    return stored


def list_files(source: Path) -> list[Path]:
    """The files of safetensors that ``source`` stands for."""
    if source.is_dir():
        files = [source / name for name in (WEIGHTS, INDEX) if (source / name).is_file()]
        if not files:
            raise FileError(f"{source} has neither {WEIGHTS} nor {INDEX}: give the path of the weights")
        source = files[0]
    if not source.is_file():
        raise FileError(f"there is no file {source}")
    if source.suffix != ".json":
        return [source]
    try:
        names = sorted(set(json.loads(source.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{source} is no index of files of safetensors: {error}") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise FileError(f"{source} names {outside[0]!r}, which is no file beside it")
    return [source.parent / name for name in names]


def find_aliases(compact: nn.Module) -> dict[str, str]:
    """Further names of parameters and buffers, each with the first name: on meta no address tells them."""
    firsts: dict[int, str] = {}
    named = [*compact.named_parameters(remove_duplicate=False), *compact.named_buffers(remove_duplicate=False)]
    pairs = [(name, firsts.setdefault(id(tensor), name)) for name, tensor in named]
    return {name: first for name, first in pairs if name != first}


def choose_stored(
    stored: Mapping[str, StoredTensor],
    wanted: Sequence[str],
    aliases: Mapping[str, str],
    param_map: ParamMap,
    source: str | Path,
) -> dict[str, StoredTensor]:
    """Where each tensor that is ``wanted`` is stored, under one of its names.

    Raises:
        FileError: something is missing, or stands there besides.
    """
    names: dict[str, list[str]] = {name: [name] for name in wanted}
    for alias, first in aliases.items():
        names.setdefault(first, []).append(alias)
    chosen = {first: stored[name] for first, known in names.items() for name in reversed(known) if name in stored}
    missing = [name for name in wanted if name not in chosen]
    foreign = [name for name in stored if name not in param_map]
    if missing or foreign:
        lacks = f"it lacks {abridge_list(missing, 3)}" if missing else ""
        has = f"it has {abridge_list(foreign, 3)} besides" if foreign else ""
        raise FileError(f"{source} does not fit the model: {' and '.join(filter(None, (lacks, has)))}")
    return chosen


def check_map(graph: Model, shapes: Mapping[str, Shape], param_map: ParamMap) -> None:
    """Raise FileError unless each tensor of the compact model, of ``shapes``, is a part of one of ``graph``."""
    before = graph.state_dict()
    for name, shape in shapes.items():
        if name not in before or name not in param_map:
            raise FileError(f"{name} of compact is no part of a weight of graph: cut it right after the rewrite")
        cut = [
            size if kept is None else len(kept) for size, kept in zip(before[name].shape, param_map[name], strict=True)
        ]
        if cut != list(shape):
            raise FileError(f"param_map does not lead from graph to compact: {name} is {list(shape)} there, not {cut}")


def check_shapes(chosen: Mapping[str, StoredTensor], graph: Model, source: str | Path) -> None:
    """Raise FileError unless what is stored is shaped like the tensors of ``graph``."""
    expected = graph.state_dict()
    for name, tensor in chosen.items():
        if tensor.shape != tuple(expected[name].shape):
            raise FileError(
                f"{source} does not fit the model: {tensor.name} is {list(tensor.shape)} in the file, "
                f"{list(expected[name].shape)} in the model"
            )


def make_header(stored: Mapping[str, StoredTensor], shapes: Mapping[str, Shape], record: Mapping[str, Any]) -> bytes:
    """The start of a file of safetensors: its length in 8 bytes, and JSON that tells where each tensor will be.

    The library writes files only of tensors that are all in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"fxprune": json.dumps(record)}}
    start = 0
    for name, shape in shapes.items():
        end = start + stored[name].count_bytes(shape)
        header[name] = {"dtype": stored[name].dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def to_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor, as they stand in memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
