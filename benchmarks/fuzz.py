"""Random networks and random plans under the laws, for as long as you like.

    python benchmarks/fuzz.py --first 0 --count 5000

Law 1 (slice = zero, in eval and train, outputs and gradients) and law 3 (composition) at 1e-10 in float64. Writes
results/fuzz.json and .md, behind the runs before; a seed that fails can be run again alone.
"""

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))

from random_networks import program_from_seed  # noqa: E402
from test_laws import hold_the_laws  # noqa: E402

from fxprune.errors import RewriteError  # noqa: E402


def main() -> None:
    """Run the laws over consecutive seeds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed: list[tuple[int, str]] = []
    refused: list[tuple[int, str]] = []
    start, done = time.monotonic(), 0
    for seed in range(options.first, options.first + options.count):
        if time.monotonic() - start > options.seconds:
            break
        try:
            hold_the_laws(program_from_seed(seed, norms=bool(seed % 2)), seed)
        except RewriteError as error:
            said = str(error).replace(f"{ROOT}{os.sep}", "")
            (refused if "please report" not in said else failed).append((seed, said))
        except Exception as error:
            failed.append((seed, f"{type(error).__name__}: {str(error)[:300]}"))
            traceback.print_exc()
        done += 1
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "fuzz.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    runs.append(
        {
            "first": options.first,
            "count": done,
            "seconds": round(time.monotonic() - start),
            "torch": torch.__version__,
            "failed": failed,
            "refused": refused,
        }
    )
    path.write_text(json.dumps(runs, indent=1) + "\n")
    (RESULTS / "fuzz.md").write_text(describe_runs(runs))
    print(describe_runs(runs))


def describe_runs(runs: list[dict[str, Any]]) -> str:
    """All runs so far, one after the other."""
    lines = [
        "# Random networks under the laws",
        "",
        "Laws 1 and 3 at 1e-10 in float64; each network has a random plan.",
    ]
    for run in runs:
        last = run["first"] + run["count"] - 1
        held = run["count"] - len(run["failed"]) - len(run["refused"])
        seeds = f"seeds {run['first']} to {last}" if run["count"] > 1 else f"seed {last}"
        lines += ["", f"- {seeds}, torch {run['torch']}: {held:,} of {run['count']:,} hold"]
        lines += [f"    - seed {seed} fails: {error}" for seed, error in run["failed"]]
        lines += [f"    - seed {seed} is refused: {error}" for seed, error in run["refused"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
