"""Meter: what an epoch of a session costs, measured or counted. It decides nothing."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.budget.cost import Channels, cost_of, params
from fxprune.budget.sums import median_norms
from fxprune.graph.inputs import bind_inputs, tensors_in
from fxprune.training import distributed
from fxprune.training.log import Epoch, Log
from fxprune.training.run import Run


class Meter:
    """Times the steps of an epoch, and makes its record."""

    def __init__(self) -> None:
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the steps of the epoch before."""
        self._start = time.perf_counter()
        self._ends: list[float] = []

    def stepped(self) -> None:
        """The optimizer has made a step."""
        self._ends.append(time.perf_counter())

    def record(self, run: Run, step_time: float | None, values: Mapping[str, float]) -> Epoch:
        """The record of the epoch that ends now.

        Args:
            run: whose epoch it is.
            step_time: seconds, instead of the median time from step to step.
            values: the caller's numbers.
        """
        if step_time is None:
            between = np.diff(self._ends).tolist()
            step_time = median(between) if between else 0.0
        step_time = distributed.largest_over_ranks(step_time)
        flops, _ = count_per_sample(run, "flops")
        steps, ranks = len(self._ends), distributed.count_ranks()
        trained = [parameter for parameter in run.graph.parameters() if parameter.requires_grad]
        reports: dict[str, float] = {}
        for training_pass, memory in run.pairs():
            reports |= training_pass.report(run, memory)
        return Epoch(
            epoch=run.epoch + 1,
            steps=steps,
            step_time=step_time,
            first_step=self._ends[0] - self._start if self._ends else 0.0,
            samples=run.batch_size,
            flops=flops,
            params=params(run.graph),
            memory=peak_memory(run),
            widths=run.analysis.sizes,
            lr=float(run.optimizer.param_groups[0]["lr"]),
            sent=2 * (ranks - 1) / ranks * sum(map(size_of, trained)) * steps,  # of a ring
            saved=seconds_saved(run.log, step_time, run.batch_size, steps),
            norms=median_norms(run.analysis),
            values={**reports, **{name: float(value) for name, value in values.items()}},
        )


def seconds_saved(log: Log, step_time: float, samples: int | None, steps: int) -> float:
    """Seconds saved until now less those that cuts took, against going on at the time of a sample before the first."""
    if not any(epoch.removed for epoch in log):
        return 0.0
    dense = [epoch for epoch in log if sum(epoch.widths.values()) == sum(log[0].widths.values())]
    before = median(epoch.step_time / (epoch.samples or 1) for epoch in dense)
    return log[-1].saved - log[-1].cut_time + (before * (samples or 1) - step_time) * steps


def step_memory(run: Run) -> tuple[float, float]:
    """Estimated bytes that a step takes on this rank: fixed, and for each sample."""
    per_sample, held = count_per_sample(run, "memory")
    gradients = sum(size_of(parameter) for parameter in run.graph.parameters() if parameter.requires_grad)
    states = sum(size_of(tensor) for state in run.optimizer.state.values() for tensor in tensors_in(state))
    return float(held + gradients + states), per_sample


def count_per_sample(run: Run, kind: str) -> tuple[float, float]:
    """A cost of a forward pass for each sample, and the bytes of weights and buffers (which "memory" leaves out)."""
    held = sum(map(size_of, (*run.graph.parameters(), *run.graph.buffers())))
    channels = Channels.of(run.analysis)
    cost = cost_of(run.analysis, kind, channels)(np.ones(len(channels.group), dtype=bool))
    return (cost - (held if kind == "memory" else 0)) / count_examples(run.example_inputs), held


def peak_memory(run: Run) -> float:
    """Bytes: the peak of the epoch on a GPU, else an estimate."""
    device = next((parameter.device for parameter in run.graph.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        highest = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(highest)
    fixed, per_sample = step_memory(run)
    return fixed + per_sample * (run.batch_size or count_examples(run.example_inputs))


def size_of(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()


def count_examples(example_inputs: Any) -> int:
    """How many samples the example inputs hold: a batch, or a list of images."""
    args, _ = bind_inputs(example_inputs)
    if args and isinstance(args[0], list):
        return max(len(args[0]), 1)
    first = next((tensor for tensor in tensors_in(bind_inputs(example_inputs)) if tensor.ndim), None)
    return 1 if first is None else max(first.shape[0], 1)
