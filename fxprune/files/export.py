"""Export to ONNX, and compare the file with PyTorch in onnxruntime before returning."""

import inspect
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.atomic import named_errors, replace_files
from fxprune.errors import ExportError, require_type
from fxprune.graph.inputs import Bound, bind_inputs, map_tensors, tensors_in
from fxprune.graph.keep import tensors_kept
from fxprune.graph.traced import Mode, TracedModule, carried_attributes, copy_model, is_traced, regions_of
from fxprune.rewrite.verify import relative_difference

logger = logging.getLogger("fxprune")
LARGEST = 1_900_000_000  # bytes of weights in one file; protobuf's limit is 2 GiB


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was compared with PyTorch.

    Attributes:
        path: of the file.
        difference: the largest, relative to the largest output.
        batches: the batch sizes it was run at.
        flat: all outputs were zero, as those of a last layer that starts at zero. Then the comparison says little.
        moving: buffers that the model writes into in eval mode. A file has no memory: there each run starts from what
            they were.
    """

    path: Path
    difference: float
    batches: tuple[int, ...]
    flat: bool = False
    moving: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = " and ".join(map(str, self.batches))
        doubt = "; all outputs were zero, so this says little: load trained weights" if self.flat else ""
        if self.moving:
            buffers = ", ".join(self.moving)
            doubt += f"; the model writes into {buffers}, the file starts each run from what is there now"
        return f"{self.path}: onnxruntime == PyTorch to {self.difference:.1e} at batch size {sizes}{doubt}"


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> Exported:
    """Write ``model`` in eval mode as ONNX, checked.

    The file is checked by onnx's checker and run in onnxruntime on random inputs at two batch sizes; the largest
    difference is logged and returned. The file appears at ``path`` only if it passes.

    Args:
        model: a compact model, a traced one, or any module that ``torch.onnx`` exports.
        example_inputs: a tensor, a tuple or dict of arguments, (args, kwargs), or a loader's batch.
        path: where to write.
        dynamic_batch: let the first axis of every input vary. Not where plain Python steers the model.
        tolerance: the largest difference allowed, relative to the largest output.

    Raises:
        ExportError: torch can't export the model, the file is not valid, or onnxruntime gives another result.
        FileError: nothing can be written there.
    """
    require_type(model, nn.Module, "model", ExportError)
    require_type(path, (str, Path), "path", ExportError)
    path = Path(path)
    if path.is_dir():
        raise ExportError(f"can't write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ExportError(f"can't write {path}: there is no folder {path.parent}")
    module = frozen_in_eval(model)
    if is_traced(model) and not isinstance(model, TracedModule):
        dynamic_batch = False  # what plain Python saw of the example is fixed
    inputs = in_order(module, bind_inputs(example_inputs, module))
    check_runs(module, inputs)
    size = next((tensor.shape[0] for tensor in tensors_in(inputs) if tensor.ndim), 1)
    sizes = (max(size, 2), max(size, 2) + 1) if dynamic_batch else (size,)
    with named_errors(path, "an ONNX model"), replace_files(path.parent) as folder:  # large ones are several files
        file = folder / path.name
        example = resize_batch(inputs, sizes[0]) if dynamic_batch else inputs
        try:
            write_onnx(module, example, file, dynamic_batch)
        except ExportError:
            if dynamic_batch or isinstance(model, TracedModule):
                raise
            write_onnx(module, example, file, dynamic_batch, dynamo=False)
        batches = [resize_batch(inputs, n) if dynamic_batch else inputs for n in sizes]
        ordered = isinstance(model, TracedModule) or dynamic_batch
        moving = find_moving_buffers(module, batches[0])
        worst, flat = compare_onnx(module, batches, file, ordered)
        if not worst <= tolerance:
            ties = "" if ordered else "Boxes chosen by scores that are all alike may differ: try trained weights. "
            raise ExportError(
                f"onnxruntime differs from PyTorch by {worst:.2e} of the largest output, allowed is {tolerance:.0e}; "
                f"nothing was written to {path}. {ties}Please report this model, or pass a larger tolerance."
            )
    result = Exported(path, worst, sizes, flat, moving)
    logger.info("%s", result)
    return result


def frozen_in_eval(model: nn.Module) -> nn.Module:
    """The model in eval mode, as a plain GraphModule where it is a traced one. The original keeps its mode."""
    module = copy_model(model)
    for path, region in regions_of(module).items():
        plain = fx.GraphModule(region.root(), region.graphs[Mode.EVAL])
        vars(plain).update(carried_attributes(region))
        if not path:
            return plain.eval()
        module.set_submodule(path, plain)
    return module.eval()


def in_order(module: nn.Module, inputs: Bound) -> Bound:
    """The arguments in the order in which ``forward`` has them, which is that of the inputs of the file."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*inputs[0], **inputs[1])
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise ExportError(f"example_inputs do not fit forward({names}): {error}") from error
    return bound.args, bound.kwargs


def check_runs(module: nn.Module, inputs: Bound) -> None:
    """Refuse inputs that the model does not run on: torch.onnx takes minutes to say so, and says it of its own code."""
    args, kwargs = inputs
    try:
        with torch.no_grad(), torch.random.fork_rng():
            module(*args, **kwargs)
    except Exception as error:
        shapes = [list(tensor.shape) for tensor in tensors_in(inputs)]
        raise ExportError(
            f"the model does not run on these example_inputs, of shapes {shapes}: {type(error).__name__}: {error}"
        ) from error


def resize_batch(inputs: Bound, size: int) -> Bound:
    """Inputs with ``size`` along the first axis: the example's own samples, repeated."""

    def repeat(tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor
        index = torch.arange(size, device=tensor.device) % tensor.shape[0]
        tensor = tensor[index]
        return tensor + 0.1 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor

    with torch.random.fork_rng(devices=[]):
        bound: Bound = map_tensors(repeat, inputs)
    return bound


def write_onnx(module: nn.Module, inputs: Bound, file: Path, dynamic_batch: bool, *, dynamo: bool = True) -> None:
    """Export with torch's dynamo exporter, or the one before it, which follows more Python; and check the file."""
    import onnx

    args, kwargs = inputs
    if args and isinstance(args[-1], dict):  # torch.onnx takes it for keyword arguments
        named = inspect.signature(module.forward).bind(*args, **kwargs)
        args, kwargs = (), dict(named.arguments)
    shapes: Any = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        spec = pytree.tree_map(
            lambda leaf: {0: batch} if isinstance(leaf, Tensor) and leaf.ndim else None, (args, kwargs)
        )
        shapes = dict(inspect.signature(module.forward).bind(*spec[0], **spec[1]).arguments)
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch has many loggers, with levels of their own
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                args,
                str(file),
                kwargs=kwargs,
                dynamo=dynamo,
                **({"dynamic_shapes": shapes} if dynamo else {"opset_version": 18}),
                verbose=False,
                external_data=dynamo and size > LARGEST,
            )
        onnx.checker.check_model(str(file))
    except Exception as error:
        hint = "" if not dynamic_batch else " If its batch size is fixed, pass dynamic_batch=False."
        cause: BaseException = error
        while cause.__cause__ is not None:  # what torch.onnx says itself is long, and the same for every model
            cause = cause.__cause__
        text = " ".join(str(cause).split())[:600]
        raise ExportError(f"torch.onnx can't export this model: {type(cause).__name__}: {text}.{hint}") from error
    finally:
        logging.disable(level)


def find_moving_buffers(module: nn.Module, inputs: Bound) -> tuple[str, ...]:
    """The names of the buffers that a run writes into; what they held is put back."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad(), tensors_kept(module):
        module(*inputs[0], **inputs[1])
        return tuple(name for name, buffer in module.named_buffers() if not torch.equal(buffer, before[name]))


def compare_onnx(module: nn.Module, batches: Sequence[Bound], file: Path, ordered: bool = True) -> tuple[float, bool]:
    """The largest difference between onnxruntime and PyTorch, relative to the largest output; and whether all are zero.

    Where outputs are not ``ordered``, the same values in another order are the same.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    worst, flat = 0.0, True
    for args, kwargs in batches:
        with torch.no_grad(), tensors_kept(module):
            expected = tensors_in(module(*args, **kwargs))
        flat = flat and not any(tensor.any() for tensor in expected)
        try:
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            arrays = [tensor.cpu().numpy() for tensor in tensors_in((args, kwargs))]
            feeds = {slot.name: array for slot, array in zip(session.get_inputs(), arrays, strict=True)}
            results = [torch.from_numpy(array) for array in session.run(None, feeds)]
        except Exception as error:
            raise ExportError(f"onnxruntime can't run this model: {type(error).__name__}: {error}") from error
        shapes, expected_shapes = ([tuple(tensor.shape) for tensor in outputs] for outputs in (results, expected))
        if shapes != expected_shapes:
            raise ExportError(f"the ONNX model returns tensors of shapes {shapes}, PyTorch {expected_shapes}")
        pairs = [(a.cpu().double(), b.double()) for a, b in zip(expected, results, strict=True)]
        gaps = [relative_difference(a, b) for a, b in pairs]
        if not ordered:  # detections, which stand in the order of scores that may be nearly equal
            again = [(a.sort(0).values, b.sort(0).values) if a.ndim else (a, b) for a, b in pairs]
            gaps = [min(gap, relative_difference(a, b)) for gap, (a, b) in zip(gaps, again, strict=True)]
        worst = max([worst, *gaps], key=lambda gap: float("inf") if math.isnan(gap) else gap)
    return worst, flat
