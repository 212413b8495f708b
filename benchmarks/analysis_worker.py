"""Prune one model with one tool for each line read, and print a line of JSON after each time.

`analysis.py` starts this in a fresh process for each (model, tool). Imports and the building of the
model are outside the clock.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import signal
import sys
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

CLASSES = 1000
SIZES = {"inception_v3": 299}  # pixels; 224 for all others


class Laps:
    """CPU seconds between one `lap` and the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = process_time()

    def lap(self, name: str) -> None:
        now = process_time()
        self.seconds[name] = now - self._last
        self._last = now


def prune_with_fxprune(model: nn.Module, x: Tensor) -> tuple[nn.Module, Laps]:
    """Cut half the channels, by the magnitude of their groups."""
    import fxprune
    from fxprune import passes

    checked = Laps()
    graph = fxprune.trace(model, x)
    checked.lap("check")
    gc.collect()  # what it leaves is none of the cut's
    laps = Laps()
    fxprune.trace(model, x, check=False)
    laps.lap("trace")
    laps.seconds["check"] = checked.seconds["check"] - laps.seconds["trace"]
    analysis = fxprune.analyze(graph, x)
    laps.lap("analyze")
    plan = passes.Magnitude(p=2).plan(analysis, fxprune.Budget(channels=0.5))
    laps.lap("plan")
    compact, _ = fxprune.rewrite(graph, analysis, plan)
    laps.lap("rewrite")
    return compact, laps


def prune_with_torch_pruning(model: nn.Module, x: Tensor) -> tuple[nn.Module, Laps]:
    """Do the same, the way Torch-Pruning's own torchvision example does."""
    import torch_pruning

    heads = [m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    laps = Laps()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=classifiers(model),
        # Widths that the heads divide. Declaring num_heads instead leaves the embedding uncut.
        round_to=max(heads, default=None),
        in_channel_groups={},  # its defaults are shared between all pruners of a process
        out_channel_groups={},
    )
    laps.lap("graph")
    pruner.step()
    laps.lap("prune")
    if isinstance(model, torchvision.models.VisionTransformer):
        model.hidden_dim = model.class_token.shape[-1]  # read by its forward
    return model, laps


TOOLS = {"fxprune": prune_with_fxprune, "torch-pruning": prune_with_torch_pruning}


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Find the layers that end in the classes: one, and one more for each auxiliary head."""
    return [
        module
        for name, module in model.named_modules()
        if re.match(r"fc|classifier|head|aux", name, re.IGNORECASE)
        and CLASSES in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0))
    ]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Make the model in eval mode, with the same weights each time, and an input of batch 1."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    size = SIZES.get(name, 224)
    return model, torch.randn(1, 3, size, size)


def check(model: nn.Module, x: Tensor) -> str:
    """Run the pruned model in eval and in train mode, on a batch of two; say what happened."""
    batch = torch.cat([x, x])
    with torch.no_grad():
        for mode in ("eval", "train"):
            try:
                output = model.train(mode == "train")(batch)
                logits = output if isinstance(output, Tensor) else output[0]
                if logits.shape != (2, CLASSES):
                    return f"{mode} mode: output {tuple(logits.shape)}"
            except Exception as error:
                return f"{mode} mode: {in_short(error)}"
    return "runs"


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def peak_bytes() -> int:
    """Return the largest resident set that this process has had."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def in_short(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:100]


def work(tool: str, name: str, limit_s: float) -> None:
    """Print one line a repeat, after the last line read whether the last result runs, or the failure."""
    out = sys.stdout

    def tell(**facts: Any) -> None:
        print(json.dumps(facts), file=out, flush=True)

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        for _ in sys.stdin:
            model, x = build(name)
            dense = parameters(model)
            gc.collect()
            signal.setitimer(signal.ITIMER_PROF, limit_s)  # CPU time; ends the process with SIGPROF
            try:
                model, laps = TOOLS[tool](model, x)
            except Exception as error:
                tell(failure=in_short(error))
                return
            signal.setitimer(signal.ITIMER_PROF, 0)
            kept = parameters(model) / dense
            tell(stages=laps.seconds, peak_bytes=peak_bytes(), parameters_kept=kept)
        tell(result=check(model, x))


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], limit_s=float(sys.argv[3]))
