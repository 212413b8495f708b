"""What a cut costs: fxprune beside Torch-Pruning on torchvision's classification models.

    python benchmarks/analysis.py [--models resnet18,vit_b_16] [--repeats 3] [--limit-s 200]

The clock takes CPU seconds on one thread: trace + analyze + plan + rewrite for fxprune, graph +
step for Torch-Pruning, both to half the channels by group magnitude. That the trace is compared with
the model, which Torch-Pruning does not do, has a column of its own. Every (model, tool) has a
process of its own, and the tools take turns, repeat by repeat: a machine that gets slower does so
for both. Each result is appended to analysis.jsonl: a broken run goes on where it stopped. Needs
Linux (/proc).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Self

from common import RESULTS, in_words, machine, table, write

TOOLS = ("fxprune", "torch-pruning")
GIB = 2**30
MEMORY_LIMIT = 16 * GIB
CHECK = "check"  # the stage of fxprune that Torch-Pruning has not: its seconds stand apart
WORKER = Path(__file__).with_name("analysis_worker.py")

Row = dict[str, Any]  # what `measure` returns
Pair = tuple[Row | None, Row | None]  # fxprune's, Torch-Pruning's


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / f"{options.name}.jsonl"
    if options.fresh:
        log.unlink(missing_ok=True)
    done = read(log, options)
    for model in options.models:
        tools = [tool for tool in options.tools if (model, tool) not in done]
        for row in measure(model, tools, options):
            done[model, row["tool"]] = row
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{model:20} {row['tool']:14} {outcome(row)}", flush=True)
    report(done, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--models", type=names, help="separated by commas; default: all")
    parser.add_argument("--tools", type=names, default=list(TOOLS), help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--repeats", type=int, default=3, help="at least")
    parser.add_argument("--at-least-s", type=float, default=2, help="repeat until a tool has used this much CPU")
    parser.add_argument("--limit-s", type=float, default=200, help="CPU seconds for one repeat")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--name", default="analysis", help="of the files of the result")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run measured")
    options = parser.parse_args()
    if unknown := set(options.tools) - set(TOOLS):
        parser.error(f"unknown tools: {', '.join(sorted(unknown))}")
    zoo = classification_models()
    options.models = options.models or zoo
    if unknown := set(options.models) - set(zoo):
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    return options


def names(text: str) -> list[str]:
    return text.split(",")


def classification_models() -> list[str]:
    import torchvision

    models: list[str] = torchvision.models.list_models(module=torchvision.models)
    return models


def read(log: Path, options: argparse.Namespace) -> dict[tuple[str, str], Row]:
    """Read what was measured so far under the same options, by model and tool."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    same = conditions(options)
    rows = [row for row in map(json.loads, lines) if same.items() <= row.items()]
    return {(row["model"], row["tool"]): row for row in rows}


def conditions(options: argparse.Namespace) -> Row:
    """Say what rows must agree in to stand in one table."""
    return {key: vars(options)[key] for key in ("repeats", "at_least_s", "limit_s")}


def measure(model: str, tools: list[str], options: argparse.Namespace) -> list[Row]:
    """Prune one model with each tool, in turns.

    A row holds the seconds of each repeat, the medians of their stages, and the peak memory;
    `result` is "runs" or what the pruned model raised, `failure` why there is none, or None.
    """
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(model, tool, options.limit_s)) for tool in tools]
        while waiting := [worker for worker in workers if worker.goes_on(options)]:
            for worker in waiting:
                worker.repeat()
        return [worker.row() | conditions(options) for worker in workers]


class Worker:
    """A fresh process that prunes one model with one tool each time it is asked to. Its memory is watched."""

    def __init__(self, model: str, tool: str, limit_s: float) -> None:
        self.model, self.tool, self.limit_s = model, tool, limit_s
        self.told: list[Row] = []
        self.ended = False
        self.largest = 0

    def __enter__(self) -> Self:
        self.err = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), self.tool, self.model, str(self.limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.err,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError), self.process, self.err:
            self.process.kill()

    @property
    def runs(self) -> list[Row]:
        return [facts for facts in self.told if "stages" in facts]

    @property
    def seconds(self) -> list[float]:
        """What each repeat took, without the check."""
        return [sum(run["stages"].values()) - run["stages"].get(CHECK, 0) for run in self.runs]

    def goes_on(self, options: argparse.Namespace) -> bool:
        """Say whether it can be asked again, and should be."""
        enough = len(self.runs) >= options.repeats and sum(self.seconds) >= options.at_least_s
        return not (self.ended or enough)

    def repeat(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(file=self.process.stdin, flush=True)
        self.hear()

    def hear(self) -> None:
        """Wait for the line that it tells next, or for its end."""
        assert self.process.stdout is not None
        while not select.select([self.process.stdout], [], [], 0.05)[0]:
            self.largest = max(self.largest, resident_bytes(self.process.pid))
            if self.largest > MEMORY_LIMIT:
                self.process.kill()
        line = self.process.stdout.readline()
        if line:
            self.told.append(json.loads(line))
        self.ended = not line or "failure" in self.told[-1]

    def row(self) -> Row:
        """Let it come to its end, and say what it told."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        while not self.ended:
            self.hear()
        self.process.wait()
        ends = {key: facts[key] for facts in self.told for key in ("failure", "result") if key in facts}
        if self.largest > MEMORY_LIMIT:
            ends["failure"] = f"memory: over {MEMORY_LIMIT / GIB:.0f} GiB"
        elif self.process.returncode == -signal.SIGPROF:
            ends["failure"] = f"time: over {self.limit_s:.0f} s"
        elif self.process.returncode != 0:
            self.err.seek(0)
            last_words = (self.err.read().strip().splitlines() or [""])[-1]
            ends["failure"] = f"exit code {self.process.returncode}: {last_words}"[:120]
        stages = self.runs[0]["stages"] if self.runs else {}
        return {
            "model": self.model,
            "tool": self.tool,
            "seconds": self.seconds,
            "stages": {stage: median(run["stages"][stage] for run in self.runs) for stage in stages},
            "peak_bytes": self.largest if "failure" in ends else self.runs[-1]["peak_bytes"],
            "parameters_kept": self.runs[-1]["parameters_kept"] if self.runs else None,
            "result": ends.get("result"),
            "failure": ends.get("failure"),
        }


def resident_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    _, label, rest = status.partition("VmRSS:")
    return 1024 * int(rest.split()[0]) if label else 0


def outcome(row: Row) -> str:
    """Say in one line the median, or what went wrong."""
    if row["failure"]:
        return str(row["failure"])
    stages = ", ".join(f"{stage} {seconds:.3g}" for stage, seconds in row["stages"].items())
    peak = f"{row['peak_bytes'] / GIB:.1f} GiB"
    return f"{median(row['seconds']):6.3g} s ({stages}), {peak}, {row['result']}"


def report(done: dict[tuple[str, str], Row], options: argparse.Namespace) -> None:
    """Print table and summary, and write them."""
    machine_facts = machine("fxprune", "torch", "torchvision", "torch-pruning")
    fxprune, torch_pruning = TOOLS
    pairs = {m: (done.get((m, fxprune)), done.get((m, torch_pruning))) for m in options.models}
    more = f", or more until a tool has used {options.at_least_s:g} s" if options.at_least_s else ""
    text = "\n".join(
        [
            "# The cost of a cut",
            "",
            "CPU seconds on one thread to cut half the channels: the median of the repeats in one process, of which "
            f"there are {options.repeats}{more}; the first, which warms up, in brackets. "
            "The tools take turns, repeat by repeat. "
            "Peak: resident memory of the process, torch included. "
            "Check: what comparing the trace with the model takes besides, outputs and gradients in both modes, and "
            "recording it for another batch; Torch-Pruning has none, so it stands in neither fxprune s nor ratio. "
            f"Parameters: what is left. Limits: {options.limit_s:.0f} CPU seconds a repeat, "
            f"{MEMORY_LIMIT // GIB} GiB.",
            "",
            in_words(machine_facts),
            "",
            "\n".join(summary(pairs)),
            "",
            comparison(pairs),
            "",
            "What failed, or left a model that does not run:",
            "",
            "\n".join(complaints(pairs)) or "- nothing",
        ]
    )
    print("\n" + text)
    rows = [row for pair in pairs.values() for row in pair if row is not None]
    write(options.out, options.name, text, {"machine": machine_facts, "rows": rows})


def comparison(pairs: dict[str, Pair]) -> str:
    stages = ("trace", "analyze", "plan", "rewrite")
    header = ["model", "fxprune s", *stages, "Torch-Pruning s", "ratio", "check s", "peak GiB", "parameters"]
    rows = []
    for model, (ours, theirs) in pairs.items():
        of_stages = ours["stages"] if ours else {}
        rows.append(
            [
                model,
                seconds(ours),
                *(f"{of_stages[stage]:.3g}" if stage in of_stages else "" for stage in stages),
                seconds(theirs),
                f"{ratio:.1f}" if (ratio := times_faster(ours, theirs)) else "",
                f"{of_stages[CHECK]:.3g}" if CHECK in of_stages else "",
                both(ours, theirs, "peak_bytes", lambda peak: f"{peak / GIB:.1f}"),
                both(ours, theirs, "parameters_kept", lambda kept: f"{kept:.0%}"),
            ]
        )
    return table(header, rows)


def summary(pairs: dict[str, Pair]) -> Iterator[str]:
    """Yield the findings, one a line."""
    faster = {m: ratio for m, (a, b) in pairs.items() if (ratio := times_faster(a, b)) is not None}
    if faster:
        yield f"- Median ratio: {median(faster.values()):.1f} (aim 3), over {len(faster)} models."
        best = {m: times_faster(*pairs[m], typical=min) for m in faster}
        yield f"- The same by the fastest repeat: {median(filter(None, best.values())):.1f}."
        both_ended = [pairs[m] for m in faster]
        checked = [median(b["seconds"]) / (median(a["seconds"]) + a["stages"][CHECK]) for a, b in both_ended]
        yield f"- Median ratio with the check counted to fxprune: {median(checked):.1f}."
    if faster and (least := [ratio for a, b in pairs.values() if (ratio := at_least(a, b)) is not None]):
        over = f"those that took Torch-Pruning more than the limit ({len(least)}) counted as the limit"
        yield f"- With {over}: {median([*faster.values(), *least]):.1f}."
    if dense := {model: ratio for model, ratio in faster.items() if model.startswith("densenet")}:
        listed = ", ".join(f"{model} {ratio:.1f}" for model, ratio in dense.items())
        yield f"- DenseNets (aim 30): {listed}."
    if faster:
        slower = [f"{model} {ratio:.2f}" for model, ratio in faster.items() if ratio < 1]
        yield f"- Slower than Torch-Pruning (aim: none): {', '.join(slower) or 'none'}."
    ours = [row for row, _ in pairs.values() if row is not None]
    if timed := [row for row in ours if row["seconds"]]:
        slowest = max(timed, key=lambda row: median(row["seconds"]))
        yield f"- Slowest for fxprune: {slowest['model']}, {median(slowest['seconds']):.3g} s."
        largest = max(timed, key=lambda row: row["peak_bytes"])
        yield f"- Largest for fxprune: {largest['model']}, {largest['peak_bytes'] / GIB:.1f} GiB."
    for index, tool in enumerate(TOOLS):
        rows = [pair[index] for pair in pairs.values()]
        unfit = [row["model"] for row in rows if row is not None and row["result"] != "runs"]
        if any(rows):
            yield f"- No result that runs, {tool}: {len(unfit)} ({', '.join(unfit) or 'none'})."


def times_faster(
    ours: Row | None, theirs: Row | None, typical: Callable[[list[float]], float] = median
) -> float | None:
    """Say how many times less CPU fxprune takes; None unless both came to an end."""
    if not ours or not theirs or ours["failure"] or theirs["failure"]:
        return None
    return typical(theirs["seconds"]) / typical(ours["seconds"])


def at_least(ours: Row | None, theirs: Row | None) -> float | None:
    """Say how many times less CPU fxprune takes at least, where Torch-Pruning was stopped at the limit of time."""
    if not ours or not theirs or ours["failure"] or not str(theirs["failure"]).startswith("time"):
        return None
    return float(theirs["limit_s"] / median(ours["seconds"]))


def seconds(row: Row | None) -> str:
    if not row:
        return ""
    if not row["seconds"]:
        return "-"
    return f"{median(row['seconds']):.3g} ({row['seconds'][0]:.3g})"


def both(ours: Row | None, theirs: Row | None, key: str, show: Callable[[float], str]) -> str:
    """Show `key` of fxprune / of Torch-Pruning."""
    values = [row[key] if row else None for row in (ours, theirs)]
    return " / ".join("-" if value is None else show(value) for value in values)


def complaints(pairs: dict[str, Pair]) -> Iterator[str]:
    """Yield each failure and each result that does not run, with its tool."""
    for model, rows in pairs.items():
        for row in rows:
            if row is not None and row["result"] != "runs":
                yield f"- {model}, {row['tool']}: {row['failure'] or row['result']}"


if __name__ == "__main__":
    main()
