"""Random networks, cut by random plans: is the graph the model, is the cut exact, and can it be cut again?

    python benchmarks/random_networks.py --seeds 0:10000                  # networks that Python steers
    python benchmarks/random_networks.py --seeds 0:10000 --of operators   # straight lines of operators

In float64 at 1e-10, in eval and train mode, outputs, gradients and buffers. The graph is compared with the model on two
batches, the compact model with the masked one (law 1), and two cuts, the second freshly analysed, with both at once
(law 3). Of one in a hundred the compact model goes through onnxruntime.

Each network is a line of the log, so a run that was stopped goes on where it was; ``--again`` repeats those that did
not hold. At the end stands a table.
"""

import argparse
import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, in_words, machine, table
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import python_networks  # noqa: E402
import random_networks as operator_networks  # noqa: E402
from laws import graph_is_model, pruned_again, random_plan, slice_is_zero  # noqa: E402
from models import randomize  # noqa: E402
from test_laws import cast  # noqa: E402

import fxprune  # noqa: E402
from fxprune import Plan, TracedModule  # noqa: E402
from fxprune.errors import FxpruneError, PlanError, VerificationError  # noqa: E402

ONNX_OF = 100  # one in so many goes through ONNX
HELD = ("whole", "plain")
WRONG = (AssertionError, VerificationError)
OURS = ("please report", "does not give what the model gives")  # refusals that say that fxprune is at fault

Drawn = tuple[nn.Module, list[Any]]  # a network and its example inputs: of each kind here, on one or two batches


def draw_python(seed: int) -> Drawn:
    """A network whose forward is Python."""
    network = python_networks.network_from_seed(seed)
    return network.build(), [network.inputs(4), network.inputs(5)]


def draw_operators(seed: int) -> Drawn:
    """A straight line of operators."""
    program = operator_networks.program_from_seed(seed, norms=bool(seed % 2))
    return operator_networks.build(program), [cast(operator_networks.inputs(program, seed), torch.float64)]


KINDS: dict[str, Callable[[int], Drawn]] = {"python": draw_python, "operators": draw_operators}


def try_network(kind: str, seed: int) -> dict[str, Any]:
    """What came of one network: ``outcome`` and what was said."""
    outcome: dict[str, Any] = {"seed": seed}
    try:
        hold_laws(*KINDS[kind](seed), seed, outcome)
        outcome["outcome"] = "whole" if outcome["whole"] else "plain"
    except Exception as error:
        outcome |= {"outcome": name_outcome(error), "said": f"{type(error).__name__}: {error}".replace(f"{ROOT}/", "")}
        if outcome["outcome"] == "crashed":
            traceback.print_exc()
    return outcome


def hold_laws(model: nn.Module, examples: list[Any], seed: int, outcome: dict[str, Any]) -> None:
    """What the head of this file says. Notes in ``outcome`` what is no fault."""
    model, example = randomize(model, seed).double().eval(), examples[0]
    graph = fxprune.trace(model, example)
    outcome["whole"] = isinstance(graph, TracedModule)
    graph_is_model(graph, model, examples)
    analysis = fxprune.analyze(graph, example)
    outcome["channels"] = sum(analysis.sizes.values())
    plan = random_plan(analysis, seed)
    slice_is_zero(graph, example, analysis, plan)
    try:
        pruned_again(graph, example, analysis, random_plan(analysis, seed + 3), seed + 4)
    except PlanError as error:
        outcome["again"] = str(error)
    if seed % ONNX_OF == 0:
        outcome["onnx"] = try_onnx(model.float(), cast(example, torch.float32), plan)


def try_onnx(model: nn.Module, example: Any, plan: Plan) -> str:
    """What becomes of a model, cut by ``plan``, as ONNX in float32: "" where onnxruntime gives the same."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            graph = fxprune.trace(model, example)
            compact, _ = fxprune.rewrite(graph, fxprune.analyze(graph, example), plan)
            fxprune.export_onnx(compact, example, Path(folder) / "compact.onnx")
        except FxpruneError as error:  # some mix types in float32, where autocast is at work
            return str(error)
    return ""


def name_outcome(error: Exception) -> str:
    """Whether an error is a wrong result, a crash, or a refusal in words."""
    if isinstance(error, WRONG) or OURS[1] in str(error):
        return "wrong"
    refused = isinstance(error, FxpruneError) and OURS[0] not in str(error).lower()
    return "refused" if refused else "crashed"


def read_log(path: Path) -> dict[int, dict[str, Any]]:
    """The last outcome of each seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {outcome["seed"]: outcome for outcome in map(json.loads, lines)}


def write_report(kind: str, outcomes: list[dict[str, Any]]) -> str:
    """The table, and each network that did not hold."""
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    sampled = [outcome["onnx"] for outcome in outcomes if "onnx" in outcome]
    rows = [
        ("one graph, exact", counts["whole"]),
        ("parts of it left to Python, exact", counts["plain"]),
        *((f"refused: {reason}", count) for reason, count in count_reasons(outcomes, "said")),
        ("wrong", counts["wrong"]),
        ("crashed", counts["crashed"]),
        *((f"second cut refused: {reason}", count) for reason, count in count_reasons(outcomes, "again")),
        ("through ONNX, equal", sum(not said for said in sampled)),
        *((f"ONNX: {reason}", count) for reason, count in count_reasons(outcomes, "onnx")),
    ]
    seeds = [outcome["seed"] for outcome in outcomes]
    title = f"{len(outcomes):,} networks of {kind}, seeds {min(seeds):,} to {max(seeds):,}"
    shares = [(what, f"{count:,}", f"{100 * count / len(outcomes):.2f}") for what, count in rows]
    faults = [outcome for outcome in outcomes if outcome["outcome"] in ("wrong", "crashed")]
    lines = [f"- seed {outcome['seed']} {outcome['outcome']}: {outcome['said'][:300]}" for outcome in faults]
    return (
        "\n".join([f"# {title}", "", table(("what came of them", "networks", "%"), shares), "", *lines]).rstrip() + "\n"
    )


def count_reasons(outcomes: list[dict[str, Any]], key: str) -> list[tuple[str, int]]:
    """What was said, without names, places and numbers, and how often; of wrong results and crashes nothing."""
    said = [each[key] for each in outcomes if each.get(key) and each["outcome"] not in ("wrong", "crashed")]
    return Counter(
        re.sub(r"\(.*?\)|`.*?`|\d+|\b\w*_\w*\b", "…", text)[:100].replace("|", "/") for text in said
    ).most_common()


def main() -> None:
    """Run what is left of the seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--seeds", default="0:1000", help="first:end, the end not included")
    add("--of", choices=KINDS, default="python", help="which networks")
    add("--log", type=Path, help="one line for each network; by default out/random_KIND.log")
    add("--seconds", type=float, default=float("inf"), help="stop after this long")
    add("--again", action="store_true", help="once more what did not hold, or was refused")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    log = options.log or ROOT / "out" / f"random_{options.of}.log"
    log.parent.mkdir(exist_ok=True)
    seeds = range(*map(int, options.seeds.split(":")))
    start = time.monotonic()
    for seed in left_over(seeds, read_log(log), options.again):
        if time.monotonic() - start > options.seconds:
            break
        begin = time.monotonic()
        outcome = try_network(options.of, seed) | {"seconds": round(time.monotonic() - begin, 2)}
        with log.open("a") as file:
            file.write(json.dumps(outcome) + "\n")
    outcomes = [outcome for seed, outcome in sorted(read_log(log).items()) if seed in seeds]
    report = f"{write_report(options.of, outcomes)}\n{in_words(machine('torch'))}\n"
    (RESULTS / f"random_{options.of}.md").write_text(report)
    print(report)


def left_over(seeds: range, outcomes: dict[int, dict[str, Any]], again: bool) -> Iterator[int]:
    """The seeds to run: without an outcome, or with one to be seen again."""
    for seed in seeds:
        done = outcomes.get(seed)
        if done is None or (again and (done["outcome"] not in HELD or done.get("again") or done.get("onnx"))):
            yield seed


if __name__ == "__main__":
    main()
