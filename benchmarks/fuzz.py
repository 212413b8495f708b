"""Random networks and random plans under the laws, for as long as you like.

    python benchmarks/fuzz.py --first 0 --count 5000

Law 1 (slice = zero, in eval and train, outputs and gradients) and law 3 (composition) at 1e-10 in float64. Writes
results/fuzz.md; a seed that fails can be run again alone.
"""

import argparse
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
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
            (refused if "please report" not in str(error) else failed).append((seed, str(error)))
        except Exception as error:
            failed.append((seed, f"{type(error).__name__}: {str(error)[:300]}"))
            traceback.print_exc()
        done += 1
    lines = [
        "# Random networks under the laws",
        "",
        f"Seeds {options.first} to {options.first + done - 1}, {time.monotonic() - start:.0f} s, "
        f"torch {torch.__version__}, float64 at 1e-10: {done - len(failed) - len(refused)} of {done} random "
        f"networks and plans hold laws 1 and 3, {len(failed)} do not, and {len(refused)} plans are refused.",
        "",
        *(f"- seed {seed} fails: {error}" for seed, error in failed),
        *(f"- seed {seed} is refused: {error}" for seed, error in refused),
    ]
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "fuzz.md").write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
