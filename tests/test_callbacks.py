"""Sessions under Lightning, Accelerate and the Trainer of Transformers: the real libraries, tiny models."""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from runs import assert_equal
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import FileError, SessionError
from fxprune.passes import PruneTrain
from fxprune.training import distributed

pytestmark = pytest.mark.filterwarnings("ignore:PruneTrain. with lambda:UserWarning")
EPOCHS, BATCH = 3, 8


class Net(nn.Module):
    """Some channels are weak: the penalty brings a few more below the threshold in every epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)
        with torch.no_grad():
            scale = torch.linspace(0.02, 1, 16)
            self.a.weight.mul_(scale[:, None, None, None])
            self.b.weight.mul_(scale[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu().reshape(-1, 16, 6, 6)  # a size that every cut changes in the graph
        return self.head(self.b(x).relu().mean((2, 3)))


X = torch.randn(4 * BATCH, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(len(X)) % 4


def passes() -> list[fxprune.TrainingPass]:
    return [PruneTrain(ratio=0.8, interval=1, threshold=0.02, proximal=True)]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def by_hand(epochs: int = EPOCHS) -> fxprune.Session:
    """The same training in a plain loop."""
    model = Net()
    session = fxprune.Session(model, X[:2], sgd(model), passes(), progress=False)
    for _ in range(epochs):
        for at in range(0, len(X), BATCH):
            task = F.cross_entropy(session.model(X[at : at + BATCH]), Y[at : at + BATCH])
            session.optimizer.zero_grad()
            (task + session.penalty(task)).backward()
            session.optimizer.step()
        session.epoch_end()
    return session


def assert_same(actual: fxprune.Session, expected: fxprune.Session) -> None:
    assert [epoch.removed for epoch in actual.log] == [epoch.removed for epoch in expected.log]
    assert [epoch.widths for epoch in actual.log] == [epoch.widths for epoch in expected.log]
    assert actual.step == expected.step
    assert actual.epoch == expected.epoch
    for name, tensor in expected.graph.state_dict().items():
        torch.testing.assert_close(actual.graph.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_penalty_brings_cuts() -> None:
    session = by_hand()
    assert sum(epoch.removed > 0 for epoch in session.log) >= 2


def momenta(optimizer: torch.optim.Optimizer) -> list[tuple[int, ...]]:
    return [tuple(state["momentum_buffer"].shape) for state in optimizer.state.values()]


# -------------------------------------------------------------------------------------------- Lightning


lightning = pytest.importorskip("lightning.pytorch")


class Lit(lightning.LightningModule):  # type: ignore[name-defined,misc]
    def __init__(self, dictionary: bool = False) -> None:
        super().__init__()
        self.net = Net()
        self.dictionary = dictionary

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("task", loss)
        return {"loss": loss, "more": x} if self.dictionary else loss

    def configure_optimizers(self) -> Any:
        return sgd(self)


def fit(
    path: Path, epochs: int = EPOCHS, module: Any = None, checkpoint: Any = None, callback: Any = None, **options: Any
) -> tuple[Any, Any]:
    from fxprune.training.trainers.lightning import Pruning

    module = module or Lit()
    pruning = callback or Pruning("net", X[:2], passes())
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[pruning, lightning.callbacks.ModelCheckpoint(path, save_top_k=-1, filename="{epoch}")],
        logger=lightning.loggers.CSVLogger(path),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), BATCH), ckpt_path=checkpoint)
    return module, pruning


quiet = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def applied(function: Callable[..., None]) -> Callable[..., None]:
    for mark in quiet:
        function = mark(function)
    return function


@applied
@pytest.mark.parametrize("dictionary", [False, True])
def test_lightning_trains_as_a_loop_does(tmp_path: Path, dictionary: bool) -> None:
    module, pruning = fit(tmp_path, module=Lit(dictionary))
    assert_same(pruning.session, by_hand())
    assert module.net is pruning.session.graph
    assert type(module).training_step.__get__(module) == module.training_step  # nothing of ours is left
    written = (next(tmp_path.glob("lightning_logs/*/metrics.csv"))).read_text()
    assert "fxprune/channels" in written


@applied
def test_lightning_resumes(tmp_path: Path) -> None:
    module, pruning = fit(tmp_path)
    network, resumed = fit(tmp_path, checkpoint=tmp_path / "epoch=0.ckpt")
    assert_same(resumed.session, pruning.session)
    assert_equal("weights", dict(network.state_dict()), dict(module.state_dict()))
    assert resumed.session.memories[0] == pruning.session.memories[0]
    assert momenta(resumed.session.optimizer) == momenta(pruning.session.optimizer)


class SeesGradients(fxprune.TrainingPass):
    """Notes the gradient that each step is made with, as the pass is shown it."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def after_backward(self, session: fxprune.Session, memory: Any) -> None:
        gradient = session.graph.get_parameter("a.weight").grad
        assert gradient is not None
        self.seen.append(gradient.clone())


@applied
def test_lightning_shows_the_gradients_of_the_step(tmp_path: Path) -> None:
    from fxprune.training.trainers.lightning import Pruning

    watching = SeesGradients()
    fit(tmp_path, 1, callback=Pruning("net", X[:2], [watching]))
    model = Net()
    optimizer = sgd(model)
    assert len(watching.seen) == len(X) // BATCH
    for at, gradient in enumerate(watching.seen):
        share = slice(at * BATCH, (at + 1) * BATCH)
        optimizer.zero_grad()
        F.cross_entropy(model(X[share]), Y[share]).backward()
        optimizer.step()
        torch.testing.assert_close(gradient, model.a.weight.grad, rtol=1e-4, atol=1e-6)


@applied
def test_lightning_with_mixed_precision(tmp_path: Path) -> None:
    _, pruning = fit(tmp_path, precision="bf16-mixed", accumulate_grad_batches=2)
    assert sum(epoch.removed > 0 for epoch in pruning.session.log) >= 2
    assert pruning.session.step == EPOCHS * len(X) // BATCH // 2


@applied
def test_lightning_fits_twice(tmp_path: Path) -> None:
    module, pruning = fit(tmp_path, epochs=1)
    fit(tmp_path, epochs=2, module=module, callback=pruning)
    assert len(pruning.session.log) == 3
    assert pruning.session.log[-1].removed >= 0


@applied
def test_lightning_fits_again_after_an_exception(tmp_path: Path) -> None:
    module = Lit()
    optimizer = sgd(module)
    module.configure_optimizers = lambda: optimizer
    ends = iter([RuntimeError("out of luck")])

    def on_train_batch_start(*_: Any) -> None:
        for error in ends:
            raise error

    from fxprune.training.trainers.lightning import Pruning

    pruning = Pruning("net", X[:2], passes())
    module.on_train_batch_start = on_train_batch_start
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, module=module, callback=pruning)
    fit(tmp_path, module=module, callback=pruning)
    assert_same(pruning.session, by_hand())


@applied
def test_lightning_refuses(tmp_path: Path) -> None:
    from fxprune.training.trainers.lightning import Pruning

    with pytest.raises(SessionError, match=r"Lit has no module 'nat'; it has net, net\.a"):
        fit(tmp_path, callback=Pruning("nat", X[:2], passes()))
    module = Lit()
    module.configure_optimizers = lambda: [sgd(module), sgd(module)]
    module.automatic_optimization = False
    with pytest.raises(SessionError, match="one optimizer, not 2"):
        fit(tmp_path, module=module)
    module, _ = fit(tmp_path)
    with pytest.raises(SessionError, match="wider or otherwise cut"):
        fit(tmp_path, module=module, checkpoint=tmp_path / "epoch=0.ckpt")


# ------------------------------------------------------------------------------------------- Accelerate


@pytest.fixture(autouse=True)
def _one_accelerator() -> Iterator[None]:
    """Accelerate keeps one state for the whole process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(epochs: int, folder: Path | None = None, load: Path | None = None, **options: Any) -> Any:
    from accelerate import Accelerator

    from fxprune.training.trainers.accelerate import prepare

    accelerator = Accelerator(cpu=True, **options)
    model = Net()
    session = fxprune.Session(model, X[:2], sgd(model), passes(), progress=False)
    loader = DataLoader(TensorDataset(X, Y), BATCH)
    model, optimizer, loader = prepare(accelerator, session, loader)
    assert model is session.model
    if load is not None:
        accelerator.load_state(str(load))
    while session.epoch < epochs:
        for x, y in loader:
            with accelerator.accumulate(model):
                task = F.cross_entropy(model(x), y)
                accelerator.backward(task + session.penalty(task))
                optimizer.step()
                optimizer.zero_grad()
        session.epoch_end()
        if folder is not None:
            accelerator.save_state(str(folder / str(session.epoch)))
    return session


def test_accelerate_trains_as_a_loop_does() -> None:
    assert_same(accelerated(EPOCHS), by_hand())


def test_accelerate_with_mixed_precision() -> None:
    """Accelerate patches forward: after a cut it must run the new one."""
    session = accelerated(EPOCHS, mixed_precision="bf16")
    assert sum(epoch.removed > 0 for epoch in session.log) >= 2
    output = session.model(X[:2])
    assert output.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        expected = type(session.graph).forward(session.graph, X[:2]).float()
    assert torch.equal(output, expected)


def test_accelerate_resumes(tmp_path: Path) -> None:
    session = accelerated(EPOCHS, tmp_path)
    resumed = accelerated(EPOCHS, load=tmp_path / "1")
    assert_same(resumed, session)
    assert_equal("weights", dict(resumed.graph.state_dict()), dict(session.graph.state_dict()))
    assert momenta(resumed.optimizer) == momenta(session.optimizer)


def test_accelerate_refuses(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from fxprune.training.trainers.accelerate import prepare

    accelerated(1, tmp_path)
    (tmp_path / "1" / "fxprune.pt").write_bytes(b"no")
    with pytest.raises(FileError, match="can't read what a session wrote"):
        accelerated(2, load=tmp_path / "1")
    model = Net()
    session = fxprune.Session(torch.compile(model, backend="eager"), X[:2], sgd(model), progress=False)
    with pytest.raises(SessionError, match="in a OptimizedModule already"):
        prepare(Accelerator(cpu=True), session)
    with pytest.raises(SessionError, match="session must be a Session"):
        prepare(Accelerator(cpu=True), model)


# ----------------------------------------------------------------------------------------- Transformers


class WithLoss(nn.Module):
    """What a Trainer takes: a model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, labels: Tensor | None = None, **more: Any) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        count = more.get("num_items_in_batch") or len(x)  # of all batches before a step
        return {"loss": F.cross_entropy(logits, labels, reduction="sum") / count, "logits": logits}


def trainer_of(path: Path, epochs: int = EPOCHS, **options: Any) -> tuple[Any, Any]:
    from transformers import Trainer, TrainingArguments

    from fxprune.training.trainers.transformers import Pruning

    arguments = TrainingArguments(
        output_dir=str(path),
        num_train_epochs=epochs,
        per_device_train_batch_size=options.pop("batch", BATCH),
        save_strategy="epoch",
        logging_strategy="epoch",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        **options,
    )
    model = WithLoss()
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, optimizers=(sgd(model), None))
    return trainer, Pruning(trainer, "net", X[:2], passes())


def test_transformers_trains_as_a_loop_does(tmp_path: Path) -> None:
    trainer, pruning = trainer_of(tmp_path)
    trainer.train()
    assert_same(pruning.session, by_hand())
    assert trainer.model.net is pruning.session.graph
    assert any("fxprune/channels" in entry for entry in trainer.state.log_history)


def test_transformers_accumulates(tmp_path: Path) -> None:
    """Two halves of a batch, whose losses add up: lambda is as for the whole batch, but for the norm."""
    trainer, pruning = trainer_of(tmp_path, 1, batch=BATCH // 2, gradient_accumulation_steps=2)
    trainer.train()
    assert pruning.session.step == len(X) // BATCH
    assert pruning.session.memories[0].lambda_ == pytest.approx(by_hand(1).memories[0].lambda_, rel=0.1)


def test_transformers_resumes(tmp_path: Path) -> None:
    trainer, pruning = trainer_of(tmp_path)
    trainer.train()
    steps = len(X) // BATCH
    again, resumed = trainer_of(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert_same(resumed.session, pruning.session)
    assert_equal("weights", dict(again.model.state_dict()), dict(trainer.model.state_dict()))
    assert momenta(resumed.session.optimizer) == momenta(pruning.session.optimizer)
    with pytest.raises(SessionError, match="wider or otherwise cut"):
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    (tmp_path / f"checkpoint-{steps}" / "fxprune.pt").unlink()
    with pytest.raises(FileError, match="saved without fxprune"):
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))


def test_transformers_refuses(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="load_best_model_at_end="):
        trainer_of(tmp_path, load_best_model_at_end=True, eval_strategy="epoch")


# ------------------------------------------------------------------------------------------------ ranks


def on_ranks(rank: int, folder: Path) -> dict[str, list[int]]:
    """Each library with DistributedDataParallel; what was cut, and whether all ranks have the same weights."""
    world, port = distributed.count_ranks(), distributed.gather_values(free_port())[0]
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (environment | addresses).items()})
    warnings.simplefilter("ignore")
    removed = {}
    _, pruning = fit(folder / "lightning", strategy="ddp", devices=world)
    trainer, callback = trainer_of(folder / "transformers", batch=BATCH // world, ddp_backend="gloo")
    trainer.train()
    for name, session in (
        ("lightning", pruning.session),
        ("accelerate", accelerated(EPOCHS)),
        ("transformers", callback.session),
    ):
        weights = [parameter.tolist() for parameter in session.graph.parameters()]
        assert len({str(weight) for weight in distributed.gather_values(weights)}) == 1, name
        assert session.log[-1].sent > 0
        assert any(isinstance(module, DistributedDataParallel) for module in (session.model, *session.around[0])), name
        removed[name] = [epoch.removed for epoch in session.log]
    return removed


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.slow
def test_each_library_on_two_ranks(tmp_path: Path) -> None:
    pool = Ranks()
    try:
        first, second = pool(2, tmp_path / "store", on_ranks, tmp_path)
    finally:
        pool.stop()
    assert first == second
    assert all(sum(count > 0 for count in counts) >= 2 for counts in first.values())
