"""Restore: what a cut took is given back in closed form, on any data, without labels and without a step of training.

The compact model and the original run side by side, layer by layer. Where what a layer reads has changed, its weights
are changed by the least that makes it give what the original gave. After He et al., "Channel Pruning for Accelerating
Very Deep Neural Networks" (2017), section 3.1, on every layer that is linear in its weights, layer after layer, so that
later ones make up for what earlier ones leave.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.channels.depth import is_sum
from fxprune.channels.interpret import Runner, bind_placeholders, describe_cause
from fxprune.errors import RestoreError, require_type
from fxprune.graph.batches import read_batches
from fxprune.graph.inputs import Bound, map_tensors, tensors_in
from fxprune.graph.places import describe_place
from fxprune.graph.traced import Mode, Model, TracedModule, device_of, in_eval, require_traced
from fxprune.progress import track_progress
from fxprune.rewrite.least_squares import Change, count_rows, fit_changes
from fxprune.rewrite.param_map import ParamMap
from fxprune.rewrite.readers import allow_rounding, count_uses, describe_reader, find_weights, has_changed_input
from fxprune.rewrite.rows import (
    LinearLayer,
    as_weight,
    draw_positions,
    find_linear_layer,
    kept_outputs,
    lay_out_input,
    lay_out_output,
)
from fxprune.tables import make_table, render_text

Rows = tuple[Tensor, Tensor, Tensor]  # float[groups, rows, columns], and twice float[groups, rows, outputs]
METHODS = ("least_squares", "batch_norm")
HELD_OUT = 8  # one batch, or sample, of so many decides and is not fitted
EXPECTED = "A batch holds what the model takes, and labels behind it if you like. compact is unchanged."
NORMS = nn.modules.batchnorm._BatchNorm
PASSED_BY = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # in eval mode they do nothing


@dataclass(frozen=True)
class RestoredLayer:
    """One layer whose input a cut changed.

    Attributes:
        name: of its weight.
        before: how far its output was from the original's on data that was held out, relative to its size.
        after: how far it is now.
        outcome: what was done, in words.
    """

    name: str
    before: float
    after: float
    outcome: str


@dataclass(frozen=True)
class Restoration:
    """What ``restore`` did: a table when it is printed.

    Attributes:
        method: that was used.
        layers: in the order of the graph, those whose input had changed.
        note: what else there is to say, such as which layers could not be restored, and why: a line for each.
    """

    method: str
    layers: tuple[RestoredLayer, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        if not self.layers:
            return self.note
        rows = [(layer.name, layer.outcome, f"{layer.before:.2%}", f"{layer.after:.2%}") for layer in self.layers]
        table = render_text(make_table(("layer", "outcome"), ("error, cut", "error, restored"), rows))
        return "\n".join(filter(None, (table, self.note)))


@dataclass
class BatchPair:
    """One batch on its way through both models."""

    dense: "Live"
    compact: "Live"
    held_out: bool


class Live(Runner):
    """One batch on its way through the eval graph of a model. A value is let go when its last reader is done."""

    def __init__(self, model: TracedModule, inputs: Bound) -> None:
        super().__init__(model, Mode.EVAL, {})
        self.args_iter = bind_placeholders(self.graph, inputs)
        self.last: dict[fx.Node, list[fx.Node]] = {}
        read: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            self.last[node] = [value for value in {*node.all_input_nodes, node} if value not in read]
            read.update(node.all_input_nodes, [node])

    def advance(self, node: fx.Node) -> None:
        """Run one node.

        Raises:
            RestoreError: it does not run on this batch.
        """
        try:
            self.env[node] = self.run_node(node)
        except Exception as error:
            raise RestoreError(
                f"node {describe_place(node)} does not run on this data: {describe_cause(error)}. {EXPECTED}"
            ) from error

    def let_go(self, node: fx.Node) -> None:
        """Forget what is not read after ``node``."""
        for value in self.last[node]:
            self.env.pop(value, None)


def restore(
    graph: Model, compact: Model, param_map: ParamMap, data: Any, *, method: str = "least_squares"
) -> Restoration:
    """Make ``compact`` give again what ``graph`` gives, as far as its layers can. ``compact`` is changed in place.

    Layers that are linear in their weights (convolutions of any kind, linear ones, the projections of attention), in
    the order of the graph: D = argmin |y - (W + D) x - b|^2 + ridge |D|^2, where x is what the compact layer reads by
    then and y what the original layer gave at the outputs that are left, or, where a residual sum follows, the sum
    without the compact model's other operand. The intercept goes to the bias, or to the running mean of the batch norm
    behind. Part of the data is held out; on it the ridge is chosen, and a layer that gets no better is left as it was.

    Both models run in eval mode with autocast off. Where plain Python steers the graphs (see ``trace``), and with
    ``method="batch_norm"``, only the running averages of batch norm are renewed.

    Args:
        graph: the traced model, as it was cut.
        compact: what ``rewrite`` made of it.
        param_map: that ``rewrite`` returned with it.
        data: one batch, or an iterable of batches such as a DataLoader, in any form of ``read_batches``; labels in it
            are not looked at.
        method: "least_squares" or "batch_norm".

    Returns:
        What was done, layer by layer.

    Raises:
        RestoreError: there is no data, the models do not run on it, they do not belong together, or ``compact`` was
            trained since it was cut. ``compact`` is unchanged then.
    """
    require_traced(graph, "graph", RestoreError)
    require_traced(compact, "compact", RestoreError)
    require_type(param_map, ParamMap, "param_map", RestoreError)
    if method not in METHODS:
        raise RestoreError(f"method={method!r} is not known; use one of {', '.join(map(repr, METHODS))}")
    check_cut(graph, compact, param_map)
    batches = read_arguments(data, compact)
    device, _ = device_of(compact)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        unchanged_on_error(compact),
        in_eval(graph, compact),
    ):
        if method == "batch_norm":
            return renew_averages(compact, batches)
        if not isinstance(compact, TracedModule):
            note = f"plain Python steers {type(compact).__name__}: its layers can't be restored one by one"
            return renew_averages(compact, batches, note)
        parts = zip((False, True), hold_out(batches), strict=True)
        pairs = [BatchPair(Live(graph, x), Live(compact, x), held_out) for held_out, part in parts for x in part]
        return restore_layers(graph, compact, param_map, pairs)


def check_cut(graph: Model, compact: Model, param_map: ParamMap) -> None:
    """Refuse a compact model that is not, or is no longer, what the cut made of ``graph``."""
    after = dict(compact.named_parameters())
    for name, parameter in graph.named_parameters():
        if name in param_map.gone:
            continue
        if parameter.is_meta:
            raise RestoreError(f"{name} is on the meta device and has no values: load the weights before the cut")
        new = after.get(name)
        if new is None or name not in param_map or (cut := param_map.slice(name, parameter)).shape != new.shape:
            shape = "missing" if new is None else list(new.shape)
            raise RestoreError(f"param_map does not lead from graph to compact: {name} is {shape} there")
        if not torch.equal(cut.to(new), new):
            raise RestoreError(
                f"{name} of compact is not the slice of {name} of graph: one of them was trained, or restored, since "
                "the cut. Restore right after the cut."
            )


def read_arguments(data: Any, model: nn.Module) -> list[Bound]:
    """The arguments of each batch, on the device of ``model``."""
    device, _ = device_of(model)
    calls = [
        map_tensors(lambda tensor: tensor.to(device), bound)
        for bound, _ in read_batches(data, model, RestoreError, "reading")
    ]
    if not calls:
        raise RestoreError("data has no batches: restoring needs some inputs, labels are not needed")
    return calls


def hold_out(batches: Sequence[Bound]) -> tuple[list[Bound], list[Bound]]:
    """The batches that are fitted, and those that are held out; a single batch is split."""
    if len(batches) > 1:
        out = {*range(HELD_OUT - 1, len(batches), HELD_OUT)} or {len(batches) - 1}
        numbered = list(enumerate(batches))
        return [batch for i, batch in numbered if i not in out], [batch for i, batch in numbered if i in out]
    sizes = {tensor.shape[0] for tensor in tensors_in(batches[0]) if tensor.ndim}
    size = max(sizes, default=1)
    if size < 2:
        raise RestoreError("data has one sample: restoring needs two at least, one of which is held out")
    first = size - max(1, size // HELD_OUT)

    def part(start: int, stop: int) -> Bound:
        split: Bound = map_tensors(
            lambda tensor: tensor[start:stop] if tensor.ndim and tensor.shape[0] == size else tensor, batches[0]
        )
        return split

    return [part(0, first)], [part(first, size)]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """While this holds, an error puts the tensors of ``model`` back."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    except BaseException:
        for name, tensor in model.state_dict().items():
            tensor.copy_(before[name])
        raise


def renew_averages(compact: nn.Module, batches: Sequence[Bound], note: str = "") -> Restoration:
    """Set the running averages of batch norm to those of ``batches``; the other layers stay in eval mode."""
    norms = [part for part in compact.modules() if isinstance(part, NORMS) and part.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # the mean of all batches
    try:
        for args, kwargs in track_progress(batches, "renewing averages") if norms else ():
            compact(*args, **kwargs)
    except Exception as error:
        raise RestoreError(
            f"the compact model does not run on this data: {describe_cause(error)}. {EXPECTED}"
        ) from error
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    done = f"the running averages of {len(norms)} batch norms were renewed" if norms else "there is no batch norm"
    return Restoration("batch_norm", note="; ".join(filter(None, (note, done))))


def restore_layers(
    graph: TracedModule, compact: TracedModule, param_map: ParamMap, pairs: list[BatchPair]
) -> Restoration:
    """Walk both models and restore each layer whose input has changed."""
    originals = {node.name: node for node in graph.graphs[Mode.EVAL].nodes}
    uses, weights = count_uses(compact), find_weights(compact)
    generator = torch.Generator().manual_seed(0)
    rows, left = [], list[str]()
    for node in walk_together(graph, compact, pairs):
        original, layer = originals.get(node.name), find_linear_layer(compact, node)
        dense = original and find_linear_layer(graph, original)
        if original is None or layer is None or dense is None:
            live, source = pairs[0].compact, pairs[0].dense
            if node.op.startswith("call") and has_changed_input(live, node, source, original, weights):
                left.append(describe_reader(compact, live, node, weights))
            continue
        place = LayerPair(compact, node, original, layer, kept_outputs(dense, param_map[layer.name]), pairs)
        if not place.is_comparable():
            left.append(f"{layer.name}: more than the channels of what it gives went")
            continue
        if (row := restore_layer(place, uses[id(layer.weight)], generator)) is None:
            continue
        rows.append(row)
        for pair in pairs:
            pair.compact.advance(node)
    note = "\n".join(f"left as cut, {line}" for line in dict.fromkeys(left) if line)
    return Restoration("least_squares", tuple(rows), note)


def walk_together(graph: TracedModule, compact: TracedModule, pairs: Sequence[BatchPair]) -> Iterator[fx.Node]:
    """The nodes of ``compact`` in order, each when all batches have its value in both models."""
    waiting = iter(graph.graphs[Mode.EVAL].nodes)
    names = {node.name for node in graph.graphs[Mode.EVAL].nodes}
    nodes = list(compact.graphs[Mode.EVAL].nodes)
    for node in track_progress(nodes, "restoring"):
        passed = list[fx.Node]()
        while node.name in names and (not passed or passed[-1].name != node.name):
            passed.append(next(waiting))
            for pair in pairs:
                pair.dense.advance(passed[-1])
        for pair in pairs:
            pair.compact.advance(node)
        yield node
        for pair in pairs:
            pair.compact.let_go(node)
            for original in passed:
                pair.dense.let_go(original)


@dataclass(frozen=True)
class LayerPair:
    """A layer where both models have arrived.

    Attributes:
        compact: the compact model.
        node: that calls the layer there.
        original: that calls it in the original.
        layer: of the compact model.
        kept: int64[outputs], which outputs of the original layer are left; None for all.
        pairs: the batches.
    """

    compact: TracedModule
    node: fx.Node
    original: fx.Node
    layer: LinearLayer
    kept: Tensor | None
    pairs: Sequence[BatchPair]

    @property
    def source(self) -> fx.Node:
        """What the layer reads in the compact model."""
        return self.node.all_input_nodes[0]

    def is_comparable(self) -> bool:
        """Whether what the layer gives was cut along its channels only."""
        pair = self.pairs[0]
        output, target = pair.compact.env[self.node], pair.dense.env[self.original]
        return tuple(output.shape) == tuple(self.at_kept(target).shape)

    def missing(self, pair: BatchPair, tail: "Tail") -> Tensor:
        """What the layer should give and does not: shaped like its output, in float32 at least."""
        output, target = widen(pair.compact.env[self.node]), self.at_kept(widen(pair.dense.env[self.original]))
        missing = target - output
        if tail.operand is None or tail.original is None:
            return missing
        added = widen(pair.compact.env[tail.operand])
        original = self.at_kept(widen(pair.dense.env[tail.original]))
        shape = [1] * output.ndim
        shape[self.layer.channel_axis] = -1
        return missing + (original - added) / tail.scale.to(missing).view(shape)

    def rows(self, tail: "Tail", held_out: bool, generator: torch.Generator) -> Iterator[Rows]:
        """Some rows of each batch: what the layer reads, what is missing, what should come out."""
        share = -(-count_rows(self.layer) // len(self.pairs))
        for pair in self.pairs:
            if pair.held_out is not held_out:
                continue
            missing = self.missing(pair, tail)
            places = draw_positions(self.layer, missing, share, generator)
            x = lay_out_input(self.layer, widen(pair.compact.env[self.source]), places)
            target = missing + widen(pair.compact.env[self.node])
            yield x, lay_out_output(self.layer, missing, places), lay_out_output(self.layer, target, places)

    def at_kept(self, value: Tensor) -> Tensor:
        """A value of the original at the channels that are left."""
        return value if self.kept is None else value.index_select(self.layer.channel_axis, self.kept.to(value.device))


@dataclass(frozen=True)
class Tail:
    """What follows a layer.

    Attributes:
        norm: the batch norm that reads it, alone and directly.
        scale: float[outputs], what batch norms on the way multiply it by.
        operand: what is added to it in a residual sum, in the compact model, if it has its value already.
        original: the same in the original.
    """

    norm: NORMS | None
    scale: Tensor
    operand: fx.Node | None = None
    original: fx.Node | None = None


def follow_layer(place: LayerPair) -> Tail:
    """What follows the layer, over batch norms and what does nothing in eval mode."""
    layer, node, live = place.layer, place.node, place.pairs[0].compact
    scale = torch.ones(live.env[node].shape[layer.channel_axis], device=layer.weight.device, dtype=torch.float64)
    norm: NORMS | None = None
    while len(node.users) == 1:
        user = next(iter(node.users))
        if is_sum(user) and not user.kwargs:
            return Tail(norm, scale, *find_operand(place, node, user))
        part = place.compact.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(part, NORMS) and part.running_var is not None and layer.channel_axis == 1:
            weight = 1.0 if part.weight is None else part.weight.double()
            scale = scale * weight * (part.running_var.double() + part.eps).rsqrt()
            norm = part if node is place.node else norm
        elif not isinstance(part, PASSED_BY):
            break
        node = user
    return Tail(norm, scale)


def find_operand(place: LayerPair, node: fx.Node, join: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The other operand of a residual sum in both models, where it has its value and is shaped like the layer's."""
    pair = place.pairs[0]
    operand = next(source for source in join.all_input_nodes if source is not node)
    original = next((value for value in pair.dense.env if value.name == operand.name), None)
    if operand not in pair.compact.env or original is None:
        return None, None
    shapes = [value.shape for value in (pair.compact.env[operand], place.at_kept(pair.dense.env[original]))]
    return (operand, original) if shapes == [pair.compact.env[place.node].shape] * 2 else (None, None)


def widen(value: Tensor) -> Tensor:
    """A value in float32 at least."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def restore_layer(place: LayerPair, uses: int, generator: torch.Generator) -> RestoredLayer | None:
    """Restore one layer; None where it gives what it gave."""
    layer, tail = place.layer, follow_layer(place)
    if not needs_restoring(place, tail):
        return None
    changes: list[Change] = []
    outcome = why_left(place, uses)
    if not outcome:
        changes = fit_changes(place.rows(tail, False, generator), layer, tail.norm is not None)
        outcome = "left as cut: no better on data that was held out"
    size, before, *after = measure_errors(changes, place.rows(tail, True, generator), tail.scale)
    best = min(range(len(after)), key=after.__getitem__, default=None)
    if best is None or not after[best] < before:
        return RestoredLayer(layer.name, before / size, before / size, outcome)
    apply_change(place, tail, changes[best])
    return RestoredLayer(layer.name, before / size, after[best] / size, "restored")


def needs_restoring(place: LayerPair, tail: Tail) -> bool:
    """Whether the layer gives something else than it gave, by more than rounding."""
    dtype = place.pairs[0].compact.env[place.node].dtype
    missing, output = 0.0, 0.0
    for pair in place.pairs:
        missing += float(place.missing(pair, tail).double().square().sum())
        output += float(pair.compact.env[place.node].double().square().sum())
    if not math.isfinite(missing):
        raise RestoreError(f"on this data the layer of {place.layer.name} gives values that are not finite. {EXPECTED}")
    return math.sqrt(missing) > allow_rounding(dtype) * math.sqrt(output)


def why_left(place: LayerPair, uses: int) -> str:
    """Why a layer is not restored; "" where it is tried."""
    layer, x = place.layer, place.pairs[0].compact.env[place.source]
    if uses > 1:
        return f"left as cut: its weight is used {uses} times"
    if layer.convolution is not None and x.ndim != len(layer.convolution.kernel_size) + 2:
        return "left as cut: its input has no batch axis"
    return ""


def measure_errors(changes: Sequence[Change], rows: Iterable[Rows], scale: Tensor) -> list[float]:
    """Norms over the rows: of what the original gave, of what is missing, and of what is missing after each change.

    ``scale``: float64[outputs], what each output is weighed by.
    """
    totals = torch.zeros(2 + len(changes), dtype=torch.float64, device=scale.device)
    for x, missing, target in rows:
        weights = scale.view(missing.shape[0], 1, -1)
        left = [missing.double() - change.give(x) for change in changes]
        for number, part in enumerate((target, missing, *left)):
            totals[number] += (part * weights).square().sum()
    size, *errors = totals.sqrt().tolist()
    return [size or 1.0, *errors]


def apply_change(place: LayerPair, tail: Tail, change: Change) -> None:
    """Change the layer, and what takes the intercept."""
    layer = place.layer
    layer.weight.add_(as_weight(layer, change.matrix).to(layer.weight))
    intercept = change.intercept.flatten()
    if layer.bias is not None:
        layer.bias.add_(intercept.to(layer.bias))
    elif tail.norm is not None and tail.norm.running_mean is not None:
        tail.norm.running_mean.sub_(intercept.to(tail.norm.running_mean))
