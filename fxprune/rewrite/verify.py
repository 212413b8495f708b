"""Verify: the masked original and the compact model are one function, in eval and train mode, outputs and gradients.

The masked original is the model with every removed slice set to zero. Where a norm runs over channels that were removed
its statistics run over the kept ones only: there the two functions differ by nature, and this is the one that is meant.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, setitem
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxprune.channels.interpret import GraphInterpreter, bind_placeholders, name_within
from fxprune.errors import VerificationError, require_type
from fxprune.graph.capture import writes
from fxprune.graph.draws import keep_draws
from fxprune.graph.guards import erase_guards
from fxprune.graph.inputs import Bound, bind_inputs, for_mode, map_tensors, tensors_in
from fxprune.graph.keep import attributes_kept, tensors_kept
from fxprune.graph.regions import replaced_forwards, steered_layers
from fxprune.graph.trace import trace
from fxprune.graph.traced import Mode, Model, TracedModule, copy_model, device_of, regions_of, require_traced
from fxprune.graph.watch import ALONE
from fxprune.rewrite.kept import Kept
from fxprune.rewrite.nans import explain_nan, find_nan
from fxprune.rewrite.norms import NormOverKept
from fxprune.rewrite.param_map import ParamMap
from fxprune.rewrite.rounding import RandomRounding, move_last_bit, move_parameters

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ROUNDINGS = 4  # runs from which the spread of rounding is measured
SPREADS = 10.0  # so many times what rounding makes of it in the original, and a difference is a fault
LARGEST = {torch.float64: 1e-4, torch.float32: 1e-2}  # a larger difference is not put down to rounding
DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
BATCH_NORMS = {
    F.batch_norm,
    torch.batch_norm,
}  # in eval mode, of one sample, wrong where the gradient is not contiguous
CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}  # with dropout between their layers


@dataclass(frozen=True)
class Verification:
    """What was compared: the largest difference, relative to the largest value of the tensor it is in.

    ``outputs`` and ``gradients`` are the largest over both modes; ``moved`` says by how much removing the channels
    moved the output of the original, so that a comparison that could not fail is seen.
    """

    outputs: float
    gradients: float
    moved: float
    tolerance: float
    trained: bool = True  # False where the model's Python does not train on the example: compared in eval mode only

    def __str__(self) -> str:
        only = "" if self.trained else "; in eval mode only, for the example does not run in train mode"
        more = ", and what this model makes of rounding" if max(self.outputs, self.gradients) > self.tolerance else ""
        return (
            f"masked original == compact: outputs to {self.outputs:.1e}, gradients to {self.gradients:.1e} "
            f"(allowed {self.tolerance:.0e}{more}; the cut itself moved the outputs by {self.moved:.1e}{only})"
        )


def verify(
    graph: Model,
    compact: Model,
    param_map: ParamMap,
    example_inputs: Any,
    *,
    dtype: torch.dtype = torch.float64,
    gradients: bool = True,
) -> Verification:
    """Compare the masked original with the compact model on ``example_inputs``. Neither is changed.

    Both are copied to ``dtype`` (float64: agreement to 1e-10, float32: to 1e-5) and dropout is switched off. A larger
    difference is a fault if it is more than ten times what rounding makes of the same output or gradient in the
    original, as it is measured then (``fxprune/rewrite/rounding.py``), or more than 1e-4 (float32: 1e-2). Where plain
    Python steers regions, what these give is compared too, before that Python looks at it. ``graph`` may be your own
    model: then its graph is compared with it too, see ``trace``.

    Raises:
        TraceError: ``graph`` is a model that has no graph, or another one.
        VerificationError: they differ, or rounding is so large that nothing can be told; says where and by how much.
    """
    require_type(graph, nn.Module, "graph", VerificationError)
    require_traced(compact, "compact", VerificationError)
    require_type(param_map, ParamMap, "param_map", VerificationError)
    graph = trace(graph, example_inputs)
    check_maps(graph, compact, param_map)
    if any(tensor.is_meta for tensor in (*graph.parameters(), *tensors_in(bind_inputs(example_inputs, graph)))):
        raise VerificationError(
            "tensors on the meta device have no values to compare: pass verify=False to prune, or load them"
        )
    with ALONE, torch.inference_mode(False), torch.enable_grad():
        return compare_models(graph, compact, param_map, example_inputs, dtype, gradients)


def check_maps(graph: Model, compact: Model, param_map: ParamMap) -> None:
    """Refuse a map that does not lead from ``graph`` to ``compact``."""
    after = dict(compact.named_parameters())
    for name, parameter in graph.named_parameters():
        kept = param_map.get(name, ())
        sizes = [size if index is None else len(index) for size, index in zip(parameter.shape, kept, strict=False)]
        if name in param_map.gone and name not in after:
            continue
        if len(kept) != parameter.ndim or name not in after or list(after[name].shape) != sizes:
            found = list(after[name].shape) if name in after else "missing"
            raise VerificationError(
                f"param_map does not lead from graph to compact: {name} is {found} there, the map gives {sizes}"
            )


def compare_models(
    graph: Model,
    compact: Model,
    param_map: ParamMap,
    example_inputs: Any,
    dtype: torch.dtype,
    gradients: bool,
) -> Verification:
    """What ``verify`` does once its arguments are known to be sound."""
    inputs = map_tensors(
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, bind_inputs(example_inputs, graph)
    )
    tolerance = TOLERANCE[dtype]
    small, masked = (copy_model(model).to(dtype) for model in (compact, graph))
    for region in (*regions_of(small).values(), *regions_of(masked).values()):
        for own in region.distinct_graphs().values():
            erase_guards(own)  # they compare the graphs with the model
    try:
        whole = outputs_of(masked, Mode.EVAL, inputs, False, None)
    except Exception as cause:
        raise VerificationError(
            f"the original does not run on these example_inputs in {dtype}: {type(cause).__name__}: {cause}"
        ) from cause
    mask_removed(masked, param_map)

    def sliced(name: str, gradient: Tensor) -> Tensor | None:
        return None if name in param_map.gone else param_map.slice(name, gradient)

    worst = {"output": 0.0, "gradient": 0.0}
    moved, trained = 0.0, True
    for mode in Mode:
        try:
            expected = outputs_of(masked, mode, inputs, gradients, param_map)
        except Exception:
            if mode is Mode.EVAL or isinstance(graph, TracedModule):
                raise
            trained = False  # plain Python that steers may want other arguments to train on
            break
        found = outputs_of_compact(small, mode, inputs, gradients, expected)
        spread: dict[tuple[str, str], float] = {}
        for kind, name, error in find_differences(expected, found, sliced):
            if math.isnan(error):
                places = (find_nan(model, mode, inputs) for model in (copy_model(graph).to(dtype), masked))
                raise VerificationError(explain_nan(mode, kind, name, *places))
            worst[kind] = max(worst[kind], error)
            if error <= tolerance:
                continue
            spread = spread or measure_spread(masked, mode, inputs, param_map, expected, sliced)
            check_difference(f"in {mode.value} mode {kind} {name}", error, spread[kind, name], dtype)
        if mode is Mode.EVAL:
            moved = max(
                (relative_difference(a, b) for _, a, b in outputs_of_both(whole, found) if a.shape == b.shape),
                default=0.0,
            )
    return Verification(worst["output"], worst["gradient"], moved, tolerance, trained)


def check_difference(what: str, error: float, spread: float, dtype: torch.dtype) -> None:
    """Refuse a difference above the tolerance unless it is what rounding makes of the original: see ``rounding``."""
    if error <= min(SPREADS * spread, LARGEST[dtype]):
        return
    said = f"{what} of the compact model differs from the masked original by {error:.2e} (relative to its largest value"
    if error <= SPREADS * spread:
        raise VerificationError(
            f"{said}), but rounding alone moves it by {spread:.0e} in the original, so that nothing can be told of it. "
            "Take other example_inputs: more samples, and such that the norms see values that differ"
        )
    raise VerificationError(
        f"{said}; allowed {TOLERANCE[dtype]:.0e}, and rounding makes {spread:.0e} of it). Please report this model."
    )


def outputs_of_compact(small: Model, mode: Mode, inputs: Bound, gradients: bool, expected: "Result") -> "Result":
    """``outputs_of`` the compact model, which may fail where plain Python steers it.

    Raises:
        VerificationError: it does not run.
    """
    try:
        return outputs_of(small, mode, inputs, gradients, None, expected.within)
    except RuntimeError as error:
        raise VerificationError(
            f"in {mode.value} mode the compact model does not run: {error}. Where plain Python steers a model, it must "
            "call the same layers as when the model was analysed: look for a choice by chance, by the values of "
            "tensors, or by what torch is set to"
        ) from error


def measure_spread(
    masked: Model,
    mode: Mode,
    inputs: Bound,
    param_map: ParamMap,
    expected: "Result",
    sliced: Callable[[str, Tensor], Tensor | None],
) -> dict[tuple[str, str], float]:
    """By how much each output and gradient of the masked original moves with the last bits of all that it computes.

    That is the largest of a few random roundings, by what ``find_differences`` names: see ``rounding``.
    """
    draws, spread = torch.Generator().manual_seed(0), dict[tuple[str, str], float]()
    for _ in range(ROUNDINGS):
        other = copy_model(masked)
        move_parameters(other, draws)
        moved: Bound = map_tensors(lambda tensor: move_last_bit(tensor, draws), inputs)
        found = outputs_of(other, mode, moved, True, param_map, expected.within, RandomRounding(draws))
        kept = {name: sliced(name, gradient) for name, gradient in found.gradients.items()}
        found = found._replace(gradients={name: gradient for name, gradient in kept.items() if gradient is not None})
        for kind, name, error in find_differences(expected, found, sliced):
            spread[kind, name] = max(spread.get((kind, name), 0.0), error)
    return spread


class Result(NamedTuple):
    """What a run of a model gave: its outputs, gradients by parameter, and what its regions and layers gave within."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    within: list[tuple[str, Tensor]]


def outputs_of_both(a: Result, b: Result) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Outputs by their names; of what was seen within, only what has the same channels in both."""
    for (name, one), (_, two) in zip(a.within, b.within, strict=True):
        if one.shape == two.shape:
            yield f"of {name}", one, two
    for number, pair in enumerate(zip(a.outputs, b.outputs, strict=True)):
        yield str(number), *pair


def find_differences(
    expected: Result, found: Result, sliced: Callable[[str, Tensor], Tensor | None]
) -> Iterator[tuple[str, str, float]]:
    """("output" or "gradient", its name, relative difference) between the masked original and the compact model.

    ``sliced`` makes of a parameter's gradient in the original, by name, the one expected in ``found``; None for none.
    """
    if (expected_count := len(expected.outputs)) != len(found.outputs) or len(expected.within) != len(found.within):
        raise VerificationError(f"the model returns {expected_count} tensors, the compact {len(found.outputs)}")
    for name, a, b in outputs_of_both(expected, found):
        yield "output", name, relative_difference(a, b)
    # Rounding in a gradient is that of the whole backward pass: it is measured against the largest gradient of all.
    gradients = expected.gradients
    largest = max((gradient.abs().max().item() for gradient in gradients.values() if gradient.numel()), default=0.0)
    for name, gradient in gradients.items():
        mine = sliced(name, gradient)
        if mine is not None:
            yield "gradient", name, relative_difference(mine, found.gradients[name], floor=largest)


def mask_removed(model: nn.Module, param_map: ParamMap) -> None:
    """Set every removed slice of every parameter of ``model`` to zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.masked_fill_(param_map.removed(name, parameter), 0)


def relative_difference(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """The largest absolute difference, relative to the largest absolute value of ``a`` (at least ``floor``)."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.detach(), b.detach()
    gap = torch.where(a == b, 0.0, a - b).abs().max().item()  # infinities are alike, too
    size = max(a.abs().nan_to_num(posinf=0.0).max().item(), floor)
    return gap / size if size else gap


def outputs_of(
    model: Model,
    mode: Mode,
    inputs: Bound,
    gradients: bool,
    param_map: ParamMap | None,
    seen_before: Sequence[tuple[str, Tensor]] = (),
    rounding: AbstractContextManager[Any] | None = None,
) -> Result:
    """The output tensors of ``model`` in one mode, and the gradients of a fixed random sum of them."""
    model.train(mode.training)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    norms = param_map.norms if param_map is not None else {}
    dtype = device_of(model)[1]
    with tensors_kept(model, parameters=may_write_parameters(model)):
        torch.manual_seed(0)
        args, kwargs = map_tensors(Tensor.clone, for_mode(inputs, mode, model))
        with (
            torch.set_grad_enabled(gradients or not isinstance(model, TracedModule)),  # for Python may ask
            attributes_kept(model),
            keep_draws(),
            Comparable(dtype),
            rounding or nullcontext(),
            masked_norms(model, norms, seen_before) as seen,
        ):
            result = model(*args, **kwargs)
        outputs = [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]
        if gradients:
            torch.manual_seed(0)
            noise = [torch.randn(each.shape).to(each) for each in outputs]  # randn_like would follow the strides
            total = sum(
                (each * weight).sum() for each, weight in zip(outputs, noise, strict=True) if each.requires_grad
            )
            if isinstance(total, Tensor):
                total.backward()  # type: ignore[no-untyped-call]
    return Result(outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, seen)


def may_write_parameters(model: Model) -> bool:
    """Whether a run may write into parameters of ``model``: a graph would show it, plain Python does not."""
    if not isinstance(model, TracedModule):
        return True
    for graph in model.distinct_graphs().values():
        for node in graph.nodes:
            writing = node.target is setitem or (node.op == "call_method" and writes(node.target))
            source = node if writing else None
            while source is not None and source.op != "get_attr":
                source = next((arg for arg in source.args[:1] if isinstance(arg, fx.Node)), None)
            if source is not None and isinstance(attrgetter(source.target)(model), nn.Parameter):
                return True
    return False


@contextmanager
def masked_norms(
    model: Model, norms: Mapping[tuple[Mode, str], Kept], before: Sequence[tuple[str, Tensor]] = ()
) -> Iterator[list[tuple[str, Tensor]]]:
    """While this holds, the norms in ``norms`` see only what is kept of their input.

    Yields a list that fills with what is given by the regions, and the layers, that plain Python calls. Where
    ``before`` is the list of another model, Python gets the values of that: it may decide by rounding, as sorting does.
    """
    seen: list[tuple[str, Tensor]] = []

    def note(path: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        seen.append((path, tensor))
        other = before[len(seen) - 1][1] if len(seen) <= len(before) else tensor
        return other.detach() + (tensor - tensor.detach()) if other.shape == tensor.shape else tensor

    def noting(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            return map_tensors(partial(note, path) if path else lambda tensor: tensor, forward(*args, **kwargs))

        return noted

    noted: dict[nn.Module, Callable[..., Any]] = {
        region: noting(path, masked_region(path, region, norms)) for path, region in regions_of(model).items()
    }
    noted |= {layer: noting(path, masked_layer(path, layer, norms)) for path, layer in steered_layers(model).items()}
    with replaced_forwards(noted):
        yield seen


def masked_region(path: str, region: TracedModule, norms: Mapping[tuple[Mode, str], Kept]) -> Callable[..., Any]:
    """What a region does, with its norms masked."""
    mine = path + "/" if path else ""
    its = {(mode, node.removeprefix(mine)): kept for (mode, node), kept in norms.items() if node.startswith(mine)}

    def forward(*args: Any, **kwargs: Any) -> Any:
        run = MaskedNorms(region, Mode.of(region), its)
        given = bind_placeholders(region.graph, (args, kwargs))
        return run.run(*given, enable_io_processing=False)

    return forward


def masked_layer(path: str, layer: nn.Module, norms: Mapping[tuple[Mode, str], Kept]) -> Callable[..., Any]:
    """What a layer that plain Python calls does, masked if it is a norm."""
    forward = layer.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        kept = norms.get((Mode.of(layer), name_within(path, "output")))
        if kept is None:
            return forward(*args, **kwargs)
        with NormOverKept(kept):
            return forward(*args, **kwargs)

    return masked


class MaskedNorms(GraphInterpreter):
    """Runs the graph of one mode; the norms of the nodes in ``norms`` see only what is kept of their input."""

    def __init__(self, module: TracedModule, mode: Mode, norms: Mapping[tuple[Mode, str], Kept]) -> None:
        shared = len(module.distinct_graphs()) == 1
        super().__init__(module, graph=module.graphs[mode])
        self.norms = {node: kept for (of, node), kept in norms.items() if shared or of is mode}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, under the mode that masks its norms where it has any."""
        if n.name not in self.norms:
            return super().run_node(n)
        with NormOverKept(self.norms[n.name]):
            return super().run_node(n)


def is_precision(value: Any) -> bool:
    """Whether a value is the dtype of floats, of no more than float32."""
    return isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize <= torch.float32.itemsize


class Comparable(TorchFunctionMode):
    """Nothing is drawn, and everything is computed in one precision, so that two models can be compared.

    Dropout returns its input: its noise has the shape of the value. Where the model asks for float32, or less, it gets
    ``dtype``.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __enter__(self) -> Self:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self.default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept dropouts and casts."""
        kwargs = {key: self.dtype if is_precision(value) else value for key, value in (kwargs or {}).items()}
        args = [self.dtype if is_precision(value) else value for value in args]
        if func in CASTS:
            return args[0].to(self.dtype)
        if func in DROPOUTS:
            return args[0]
        if func is Tensor.bernoulli_:  # of stochastic depth: a branch that is gone draws no number
            return args[0].fill_(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        if func is F.scaled_dot_product_attention:
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0}
        if func in RECURRENT:  # the probability stands behind the number of layers
            at = next(at for at, value in enumerate(args) if type(value) is int) + 1
            args = [*args[:at], 0.0, *args[at + 1 :]]
        result = func(*args, **kwargs)
        if func in BATCH_NORMS and result.requires_grad:
            result.register_hook(
                Tensor.contiguous
            )  # of one sample in eval mode torch 2.14 misreads it otherwise, on CPUs
        return result
