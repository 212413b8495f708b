"""Timing: seconds of things that run in turns, so that a machine that slows down slows all of them.

``torch.utils.benchmark`` runs each, with warm-up, and waits for the GPU. On one CPU thread the time is that thread's
own, which other programs can't stretch; elsewhere it is that of the clock on the wall. Page faults count: on Linux, a
process that does not keep what it frees (``fxprune.cli.malloc``) takes its memory anew in each run.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.graph.inputs import Bound, bind_inputs

BLOCK = 0.02  # seconds that a turn takes at least, where one run takes less
ROUNDS = 5  # at least
LAYERS = 0.1  # of the seconds that a model is run for, with a clock on every layer


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Any) -> "Spread":
        """Of numbers, one at least."""
        low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)


def in_turns(
    runs: Mapping[str, Callable[[], Any]], *, seconds: float = 1.0, threads: int | None = None
) -> dict[str, list[float]]:
    """Seconds of each run, a number a round; the order is drawn anew in each round.

    Args:
        runs: what to time.
        seconds: that all rounds take about, for each run, on the clock that times them; five rounds are made at least.
        threads: of the CPU, for torch; default, those that torch uses now.
    """
    from torch.utils.benchmark import Timer  # imports what builds extensions, and that warns where there is no GPU

    threads = threads or torch.get_num_threads()
    clock = clock_for(threads)
    timers = {
        name: Timer("run()", timer=clock, globals={"run": run}, num_threads=threads) for name, run in runs.items()
    }
    guesses = {name: timer.timeit(2).median for name, timer in timers.items()}
    number = {name: max(2, round(BLOCK / max(guess, 1e-9))) for name, guess in guesses.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, end = random.Random(0), clock() + seconds * len(runs)
    while clock() < end or min(map(len, times.values())) < ROUNDS:
        for name in order.sample(list(runs), len(runs)):
            times[name].append(timers[name].timeit(number[name]).median)
    return times


def clock_for(threads: int) -> Callable[[], float]:
    """The clock for work on so many CPU threads, or on a GPU where there is one."""
    if torch.cuda.is_available():
        from torch.utils.benchmark.utils.timer import timer

        wait: Callable[[], float] = timer  # for the GPU
        return wait
    return time.thread_time if threads == 1 else time.perf_counter


def make_forward(model: Callable[..., Any], example_inputs: Any) -> Callable[[], Any]:
    """A forward pass without gradients, in the model's mode."""
    args, kwargs = bind_inputs(example_inputs)

    def run() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run


def ratio_of_times(first: list[float], second: list[float]) -> Spread:
    """The times of the second over those of the first in the same rounds."""
    return Spread.of(np.array(second) / np.array(first))


def by_module(models: Mapping[str, nn.Module], inputs: Bound, seconds: float) -> dict[str, dict[str, float]]:
    """For each model, the median seconds of each module that calls no other; forward passes take turns."""
    clocks = {name: Clock(model) for name, model in models.items()}
    runs = {name: make_forward(model, inputs) for name, model in models.items()}
    for run in runs.values():
        run()
    clock = clock_for(torch.get_num_threads())
    end, rounds = clock() + seconds * len(models), 0
    while clock() < end or rounds < ROUNDS:
        rounds += 1
        for name, run in runs.items():
            run()  # what another model left in the caches goes
            with clocks[name].running():
                run()
    return {name: clock.medians() for name, clock in clocks.items()}


class Clock:
    """Takes the time of each module of a model that calls no other."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.passes: list[dict[str, float]] = []
        self.clock = clock_for(torch.get_num_threads())
        self.started = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the calls of modules in one forward pass."""
        self.passes.append({})
        hooks = []
        for path, module in self.model.named_modules():
            if not any(True for _ in module.children()):
                hooks.append(module.register_forward_pre_hook(lambda *_: self.start()))
                hooks.append(module.register_forward_hook(lambda *_, path=path: self.stop(path)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def start(self) -> None:
        """A module begins."""
        self.started = self.clock()

    def stop(self, path: str) -> None:
        """A module ends; one that is called twice takes both times."""
        seconds = self.passes[-1]
        seconds[path] = seconds.get(path, 0.0) + self.clock() - self.started

    def medians(self) -> dict[str, float]:
        """Seconds of each module."""
        return {path: float(np.median([seconds.get(path, 0.0) for seconds in self.passes])) for path in self.passes[0]}


def stand_in(tensor: Tensor, device: torch.device) -> Tensor:
    """Data of the shape and dtype of a meta ``tensor``; any other, as it is."""
    if not tensor.is_meta:
        return tensor.to(device)
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, dtype=tensor.dtype, device=device)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
