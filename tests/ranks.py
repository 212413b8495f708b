"""Real processes that train together, over gloo: started once, then each test runs one function on every rank."""

import multiprocessing
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


class Ranks:
    """As many processes as a test asks for. One that fails or hangs ends them all; the next test gets new ones."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")  # which imports fxprune once for all of them
        self.context.set_forkserver_preload(["fxprune.passes", "fxprune.training.session", "torch._dynamo"])
        self.workers: list[tuple[Any, Any]] = []

    def __call__(
        self, world: int, store: Path, function: Callable[..., Any], *args: Any, timeout: float = 120
    ) -> list[Any]:
        """``function(rank, *args)`` on each of ``world`` ranks, which meet at the file ``store``: what they return."""
        while len(self.workers) < world:
            near_end, far_end = self.context.Pipe()
            process = self.context.Process(target=serve, args=(far_end,), daemon=True)
            process.start()
            self.workers.append((process, near_end))
        for rank, (_, connection) in enumerate(self.workers[:world]):
            connection.send_bytes(pickle.dumps((function, rank, world, str(store), args)))
        results: dict[int, Any] = {}
        failures = {}
        end = time.monotonic() + timeout
        while len(results) < world and time.monotonic() < end:
            for rank, (process, connection) in enumerate(self.workers[:world]):
                if rank not in results and connection.poll(0.01):
                    failed, results[rank] = pickle.loads(connection.recv_bytes())
                    if failed:
                        failures[rank] = results[rank]
                        end = min(end, time.monotonic() + 3)  # the others may wait for it in vain
                elif not process.is_alive():
                    failures[rank], end = f"exit code {process.exitcode}", 0
        if failures or len(results) < world:
            self.stop()
            missing = sorted(set(range(world)) - set(results))
            told = "\n".join(f"rank {rank}:\n{text}" for rank, text in failures.items())
            pytest.fail(f"{told}\nranks without an answer within {timeout} s: {missing}", pytrace=False)
        return [results[rank] for rank in range(world)]

    def stop(self) -> None:
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers = []


def serve(connection: Any) -> None:
    """Run what comes, each time in a process group of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    while True:
        function, rank, world, store, args = pickle.loads(connection.recv_bytes())
        torch.manual_seed(0)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
            )
            answer = False, function(rank, *args)
            dist.destroy_process_group()
        except BaseException:
            answer = True, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
