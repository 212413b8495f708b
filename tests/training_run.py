"""A training run that saves after every epoch and goes on from its last checkpoint, for tests that kill it.

    python tests/training_run.py

For each folder read from standard input, a process is forked that trains there; its number is written to standard
output, and after one more line of input how it ended. Forking spares each run the imports. A run writes what it
computes, exactly, to a file of its own in the folder: the loss of every step, and a line for every epoch.
"""

import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import Residual, conv_bn, head
from runs import Thin
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from fxprune import Session, passes

EPOCHS, BATCHES = 9, 4
EXAMPLE = torch.zeros(2, 3, 8, 8)
PASSES = [passes.PruneTrain(ratio=0.5, interval=3, threshold=0.1), Thin(4)]
Note = Callable[[str, str], None]


def network() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), Residual(8, 8), nn.Dropout(0.2), Residual(8, 8), nn.Dropout(0.1), head(8))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8 * BATCHES, 3, 8, 8, generator=generator)
    return TensorDataset(x, x.mean(1).flatten(1).argmax(1) % 4)


class Run:
    """Everything that a user's script holds: made anew, or as the last checkpoint has it."""

    def __init__(self, path: Path, pruners: Any = PASSES) -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)
        model = network().train()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        self.path = path
        if path.exists():
            self.session = Session.load(path, model, EXAMPLE, optimizer, progress=False)
        else:
            self.session = Session(model, EXAMPLE, optimizer, pruners, batch_size=8, progress=False)
        self.scheduler = lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        self.ema = AveragedModel(self.session.model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        self.session.register(scheduler=self.scheduler, ema=self.ema)
        self.loader = DataLoader(data(), batch_size=8, shuffle=True)

    def train(self, epochs: int = EPOCHS, note: Note = lambda key, value: None) -> None:
        """Go on until so many epochs have ended, and save after each."""
        session = self.session
        optimizer = session.optimizer
        while session.epoch < epochs:
            for step, (x, y) in enumerate(self.loader):
                x = x + random.random() * 0.01 + np.random.rand() * 0.01
                task = nn.functional.cross_entropy(session.model(x), y)
                loss = task + session.penalty(task)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                self.ema.update_parameters(session.model)
                note(f"{session.epoch}.{step}", loss.item().hex())
            self.scheduler.step()
            record = session.epoch_end()
            widths = sum(session.analysis.sizes.values())
            note(f"{session.epoch}", f"{widths} {record.values['lambda'].hex()} {digest(self.ema)} {digest(optimizer)}")
            session.save(self.path)


def digest(thing: Any) -> str:
    """A number that every bit of every tensor in a state changes, and the first learning rate."""
    leaves = torch.utils._pytree.tree_leaves(thing.state_dict())
    total = sum((leaf.double() * (at + 1)).sum().item() for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    return float(total).hex()


def main(folder: Path) -> None:
    """Train in ``folder``, from the checkpoint there if there is one."""
    warnings.simplefilter("ignore")  # PruneTrain: the rate is high for its lambda
    with open(folder / f"{os.getpid()}.txt", "w", encoding="utf-8") as file:

        def note(key: str, value: str) -> None:
            file.write(f"{key} {value}\n")
            file.flush()

        Run(folder / "run.pt").train(note=note)


def serve() -> None:
    """Fork a run for each folder that is asked for."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                main(Path(line.strip()))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(child, flush=True)
        sys.stdin.readline()  # until then the process is not waited for, so that its number stays its own
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
