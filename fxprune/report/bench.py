"""Bench: a compact model beside the dense one, in time and in FLOPs."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxprune.budget.cost import count_flops
from fxprune.budget.timing import Spread, by_module, in_turns, ratio_of_times
from fxprune.errors import BenchError, FxpruneError, require_type
from fxprune.graph.inputs import Bound, bind_inputs, map_tensors, tensors_in
from fxprune.graph.refusal import DoesNotRunError
from fxprune.graph.trace import trace
from fxprune.graph.traced import TracedModule, device_of, in_eval
from fxprune.progress import track_progress
from fxprune.report.backends import BACKENDS, repeat_samples, usual_backends
from fxprune.tables import Pair, format_milliseconds, format_share, make_table, render_text

if TYPE_CHECKING:
    from rich.table import Table

FELL = 0.95  # of its FLOPs: a layer with less is one that was cut
IDLE = 0.25  # seconds saved for FLOPs saved, both in percent: where it is less, the cut hardly pays


@dataclass(frozen=True)
class Measured:
    """A forward pass of both models in one backend, at one batch size. Seconds: median and quartiles.

    ``ratio`` is that of the times in the same round, after over before, so that a busy machine cancels out. Where
    ``problem`` is not empty it says why there are no times.
    """

    backend: str
    batch: int
    before: Spread | None
    after: Spread | None
    ratio: Spread | None
    efficiency: float | None
    problem: str = ""


@dataclass(frozen=True)
class Bench:
    """A compact model beside the dense one. Printing it gives a table.

    Attributes:
        rows: the times, by backend and batch size.
        flops: of a forward pass on the example inputs, before and after.
        layers: seconds of each layer in PyTorch, on the example inputs, before and after.
        layer_flops: FLOPs of each layer.
        machine: that it ran on, in words, with its threads.
    """

    rows: tuple[Measured, ...]
    flops: Pair
    layers: Mapping[str, Pair]
    layer_flops: Mapping[str, Pair]
    machine: str

    def idle(self, groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, tuple[float, float]]:
        """What saved FLOPs but hardly any time: the share of FLOPs and of time that is left, by name.

        Args:
            groups: the layers that the channels of each group go through; default, each layer for itself.
        """
        wasted = {}
        for name, paths in (groups or {path: [path] for path in self.layers}).items():
            measured = [path for path in paths if path in self.layers and path in self.layer_flops]
            flops, seconds = (
                [sum(costs[path][k] for path in measured) for k in (0, 1)] for costs in (self.layer_flops, self.layers)
            )
            if not flops[0] or not seconds[0] or flops[1] > FELL * flops[0]:
                continue
            left = flops[1] / flops[0], seconds[1] / seconds[0]
            if 1 - left[1] < IDLE * (1 - left[0]):
                wasted[name] = left
        return wasted

    def to_json(self) -> dict[str, Any]:
        """The bench as JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        return render_text(bench_table(self), self.machine)


def bench(
    dense: nn.Module,
    compact: nn.Module,
    example_inputs: Any,
    *,
    batches: Sequence[int] = (1, 32),
    backends: Sequence[str] | None = None,
    seconds: float = 2.0,
    threads: int | None = None,
) -> Bench:
    """Time forward passes in eval mode of two models, which take turns. Neither is changed.

    *Efficiency* is the speed-up over the reduction in FLOPs: 1 where every FLOP saved is time saved, less where some of
    them are not.

    Args:
        dense: a model; traced or not.
        compact: what was made of it.
        example_inputs: a tensor, a tuple or dict of arguments, (args, kwargs), or a loader's batch.
        batches: batch sizes; the example's own samples are repeated. Where plain Python steers a model, only its own.
        backends: of "eager", "compile", "onnxruntime", "onnxruntime-cuda"; default, all that the weights' device has.
        seconds: that each model is run for, in each backend at each batch size.
        threads: of the CPU; default, those that torch uses now.

    Raises:
        BenchError: a backend that is not known, a batch size that is none, or a model does not run on the inputs. A
            backend that can't run the models is a row that says so.
    """
    models = {"before": dense, "after": compact}
    for model in models.values():
        require_type(model, nn.Module, "model", BenchError)
    device, _ = device_of(dense)
    backends = usual_backends(device) if backends is None else backends
    for backend in backends:
        if backend not in BACKENDS:
            raise BenchError(f"no backend is called {backend!r}; there are {', '.join(BACKENDS)}")
    if not batches or not all(isinstance(batch, int) and batch > 0 for batch in batches):
        raise BenchError(f"batches={batches!r} must be positive integers, such as (1, 32)")
    inputs: Bound = map_tensors(lambda tensor: tensor.to(device), bind_inputs(example_inputs, dense))
    threads = threads or torch.get_num_threads()
    with in_eval(*models.values()):
        try:
            traced = [trace(model, inputs) for model in models.values()]
            counted = [count_flops(model, inputs) for model in traced]
        except DoesNotRunError as error:
            raise BenchError(str(error)) from error
        except Exception as error:
            raise BenchError(f"a model does not run on these inputs: {type(error).__name__}: {error}") from error
        if not all(isinstance(model, TracedModule) for model in traced):
            batches = [next((tensor.shape[0] for tensor in tensors_in(inputs) if tensor.ndim), 1)]
        flops = counted[0].get("", 0), counted[1].get("", 0)
        rows = [
            measure_models(models, inputs, batch, backend, seconds, threads, flops)
            for batch, backend in track_progress([(batch, name) for name in backends for batch in batches], "measuring")
        ]
        times = by_module(models, inputs, seconds)
    return Bench(
        rows=tuple(rows),
        flops=flops,
        layers={path: (amount, times["after"].get(path, 0.0)) for path, amount in times["before"].items()},
        layer_flops={path: (amount, counted[1].get(path, 0)) for path, amount in counted[0].items()},
        machine=f"{name_processor(device)}, {threads} CPU thread{'s' * (threads > 1)}, torch {torch.__version__}",
    )


def measure_models(
    models: Mapping[str, nn.Module],
    inputs: Bound,
    batch: int,
    backend: str,
    seconds: float,
    threads: int,
    flops: Pair,
) -> Measured:
    """One row."""
    sized: Bound = map_tensors(lambda tensor: repeat_samples(tensor, batch), inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # torch.compile asks when it compiles
    try:
        runs = {name: BACKENDS[backend](model, sized, threads) for name, model in models.items()}
        times = in_turns(runs, seconds=seconds, threads=threads)
    except Exception as error:
        why = str(error) if isinstance(error, FxpruneError) else f"{type(error).__name__}: {error}"
        return Measured(backend, batch, None, None, None, None, why.strip().partition("\n")[0])
    finally:
        torch.set_num_threads(before)
    left = ratio_of_times(times["before"], times["after"])
    efficiency = flops[1] / flops[0] / left.median if all(flops) else None
    return Measured(backend, batch, Spread.of(times["before"]), Spread.of(times["after"]), left, efficiency)


def bench_table(bench: Bench) -> "Table":
    """A row a backend and batch size: milliseconds, what is left of them beside what is left of the FLOPs."""
    left = format_share(bench.flops)
    rows = []
    for row in bench.rows:
        if row.before is None or row.after is None or row.ratio is None:
            rows.append((row.backend, str(row.batch), row.problem or "not measured", "", "", "", ""))
            continue
        efficiency = "" if row.efficiency is None else f"{row.efficiency:.2f}"
        spread = f"{row.ratio.median:.0%} ({row.ratio.low:.0%} – {row.ratio.high:.0%})"
        times = (format_milliseconds(row.before.median), format_milliseconds(row.after.median))
        rows.append((row.backend, str(row.batch), *times, spread, left, efficiency))
    heads = ("batch", "before, ms", "after, ms", "time left (quartiles)", "FLOPs left", "efficiency")
    return make_table(("backend",), heads, rows)


def idle_table(idle: Mapping[str, tuple[float, float]], noun: str = "layers") -> "Table":
    """The groups or layers that saved FLOPs but hardly any time."""
    rows = [(name, f"{flops:.0%}", f"{seconds:.0%}") for name, (flops, seconds) in idle.items()]
    return make_table((f"{noun} that save FLOPs but hardly any time",), ("FLOPs left", "time left"), rows)


def name_processor(device: torch.device) -> str:
    """The name of a device, as far as the system tells."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def cpu_model() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
