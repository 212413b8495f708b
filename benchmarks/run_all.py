"""The benchmarks, one after the other: each writes its table and its raw numbers, which the documentation shows.

    python benchmarks/run_all.py                      those of minutes: about half an hour on two cores
    python benchmarks/run_all.py --full --data PATH   all of them: hours. PATH as for benchmarks/cifar10.py; without it
                                                      those that train are left out
    python benchmarks/run_all.py --try                small settings, into out/benchmarks: shows that they run

Each is a process of its own. Results of a machine that does other things besides are worth little, so a busy one is
refused unless you say --busy; --try takes any.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS

HERE, TRIALS = Path(__file__).parent, Path("out/benchmarks")
QUIET = 0.5  # cores that other programs may keep busy
SMALL = (  # models whose cut takes little time, where what a tool does besides counts
    "alexnet convnext_tiny densenet121 densenet201 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 shufflenet_v2_x1_0 squeezenet1_0 "
    "vgg11 vit_b_32"
)


@dataclass(frozen=True)
class Benchmark:
    """A script, its options, those of a trial, and when it runs."""

    script: str
    options: str = ""
    trial: str | None = None  # None: not in a trial
    full: bool = False  # only with --full
    trains: bool = False  # needs --data
    folder: str = "--out"  # the option that says where the results go; "" where it is always the same


BENCHMARKS = (
    Benchmark("widths", trial="--runs 2"),
    Benchmark(
        "analysis",
        f"--name analysis_small --fresh --models {SMALL.replace(' ', ',')}",
        "--name analysis_small --fresh --models resnet18 --repeats 1",
    ),
    Benchmark("reconfigure", trial="--size 32 --batch 2 --rounds 1"),
    Benchmark("dropback", trial="--size 32 --batch 2 --rounds 1 --models resnet18"),
    Benchmark("analysis", "--fresh", full=True),
    Benchmark("pattern_conv", full=True, folder="--results"),
    Benchmark("zoo", "--onnx", full=True, folder=""),
    Benchmark("random_networks", "--seeds 0:1000000 --seconds 1500", full=True, folder=""),
    Benchmark("random_networks", "--of operators --seeds 0:1000000 --seconds 1500", full=True, folder=""),
    Benchmark("before_training", full=True, trains=True),
    Benchmark("criteria_cifar10", full=True, trains=True),
    Benchmark("restore_cifar10", full=True, trains=True),
    Benchmark("dropback_cifar10", full=True, trains=True, folder="--results"),
    Benchmark("prunetrain_optimizers", full=True, trains=True, folder="--results"),
    Benchmark("prunetrain_controls", full=True, trains=True, folder="--results"),
    Benchmark("clicktrain_cifar10", full=True, trains=True, folder="--results"),
    Benchmark(
        "cifar10",
        "--epochs 20 --ratio 0.1 --round-to 16 --out out/prunetrain_cifar10",
        full=True,
        trains=True,
        folder="",
    ),
    Benchmark(
        "cifar10",
        "--method activation_density --epochs 12 --limit 10000 --saturation 0.05 --patience 1 --cooldown 3 "
        "--out out/activation_density",
        full=True,
        trains=True,
        folder="",
    ),
)


def main() -> None:
    options = parse_arguments()
    if not (options.trial or options.busy):
        wait_for_quiet()
    failed = []
    for benchmark in choose_benchmarks(options):
        command = [sys.executable, str(HERE / f"{benchmark.script}.py"), *list_arguments(benchmark, options)]
        print("\n==", " ".join(command[1:]), flush=True)
        begin = time.perf_counter()
        code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
        print(f"== {benchmark.script}: exit code {code}, {(time.perf_counter() - begin) / 60:.1f} minutes", flush=True)
        failed += [benchmark.script] * (code != 0)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def wait_for_quiet(tries: int = 24) -> None:
    """Leave if the machine stays busy; the load is that of the last minute, in which this may have been installed."""
    for left in reversed(range(tries)):
        load = os.getloadavg()[0]
        if load <= QUIET:
            return
        if left:
            print(f"waiting for a quiet machine: {load:.1f} of its cores were busy in the last minute", flush=True)
            time.sleep(5)
    raise SystemExit(
        f"other programs keep {load:.1f} cores of this machine busy: their work would be in the results. Wait, or say "
        "--busy."
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--full", action="store_true", help="the long ones too")
    add("--data", type=Path, help="the folder of the images, for those that train")
    add("--only", nargs="+", choices=sorted({benchmark.script for benchmark in BENCHMARKS}), help="only these")
    add("--try", dest="trial", action="store_true", help=f"small settings, into {TRIALS}")
    add("--busy", action="store_true", help="run although other programs do")
    options = parser.parse_args()
    if not list(choose_benchmarks(options)):
        parser.error("nothing is left to run: some need --full, those that train --data, and not all can be tried")
    return options


def choose_benchmarks(options: argparse.Namespace) -> list[Benchmark]:
    """The benchmarks that the options ask for."""
    named = [benchmark for benchmark in BENCHMARKS if options.only is None or benchmark.script in options.only]
    if options.trial:
        return [benchmark for benchmark in named if benchmark.trial is not None]
    asked = [benchmark for benchmark in named if options.full or not benchmark.full]
    return [benchmark for benchmark in asked if options.data or not benchmark.trains]


def list_arguments(benchmark: Benchmark, options: argparse.Namespace) -> list[str]:
    """The arguments of a script."""
    options_text = (benchmark.trial or "" if options.trial else benchmark.options).split()
    if benchmark.folder:
        options_text += [benchmark.folder, str(TRIALS if options.trial else RESULTS)]
    return options_text + (["--data", str(options.data)] if benchmark.trains else [])


if __name__ == "__main__":
    main()
