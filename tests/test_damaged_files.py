"""Every field of every format, changed in every way: one clear error that changes nothing, or a load that is right."""

import copy
import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from runs import Thin
from torch import Tensor, nn

import fxprune
from fxprune import Plan, Session, passes
from fxprune.errors import FileError
from fxprune.training.trainers.shared import read_progress, resume_run, write_progress

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LOST = object()  # stands for a field that is not there
VALUES: list[Any] = [LOST, None, "text", -1, 10**20, 0.5, float("nan"), [], {}, True, [[]], {"a": {}}]
SAMPLE = 6  # of how many variants one is tried where the test is not slow


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
    )


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything in a tree is: of a long list its ends, of a log its first record."""
    yield path
    keys = (
        list(tree) if isinstance(tree, dict) else [0, len(tree) - 1] if isinstance(tree, (list, tuple)) and tree else []
    )
    for key in dict.fromkeys(keys):
        yield from places(tree[key], (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``tree`` with another value at one place."""
    if not path:
        return value
    first, *rest = path
    inner = replaced(tree[first], tuple(rest), value)
    if isinstance(tree, dict):
        return {key: inner if key == first else old for key, old in tree.items() if key != first or inner is not LOST}
    changed = [inner if at == first else old for at, old in enumerate(tree) if at != first or inner is not LOST]
    return tuple(changed) if isinstance(tree, tuple) else changed


def values_for(value: Any) -> list[Any]:
    """What to put in the place of ``value``."""
    if isinstance(value, Tensor):
        wider = torch.zeros(*[size + 1 for size in value.shape] or [2])
        return [*VALUES, wider, value.flatten()[:1].clone(), value.to(torch.int64), value.to(torch.complex64)]
    if isinstance(value, dict):
        return [*VALUES, value | {"extra": 3}]
    if isinstance(value, list):
        return [*VALUES, value + value[:1], value[::-1]]
    return VALUES


def variants(tree: Any, every: int) -> Iterator[tuple[str, Any]]:
    """Damaged copies of ``tree``, each with its name."""
    variations = []
    for path in places(tree):
        branch = tree
        for key in path:
            branch = branch[key]
        variations += [(path, value) for value in values_for(branch) if path or value is not LOST]
    for path, value in random.Random(0).sample(variations, len(variations) // every):
        yield f"{path}: {value!r:.40}", replaced(tree, path, value)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def trained(folder: Path) -> Session:
    """A session that has cut once, of two passes."""
    model = network()
    session = Session(model, X, optimizer_of(model), [passes.PruneTrain(threshold=1e-3), Thin()], progress=False)
    session.register(scheduler=torch.optim.lr_scheduler.StepLR(session.optimizer, 3))
    for _ in range(2):
        step(session)
        session.epoch_end()
    return session


def step(session: Session) -> None:
    task = session.model(X).square().mean()
    (task + session.penalty(task)).backward()
    session.optimizer.step()
    session.optimizer.zero_grad()


class Target:
    """What a file is loaded for; ``load`` returns after a use of what it gave."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "file"
        self.model = network()
        self.model.train()

    def unchanged(self) -> dict[str, Tensor]:
        return copy.deepcopy(self.model.state_dict())


class PlanFile(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        analysis = fxprune.analyze(fxprune.trace(self.model, X), X)
        keep = {name: range(1, size) for name, size in analysis.sizes.items()}
        self.tree = Plan(keep, analysis.sizes, analysis.options).to_json()
        self.write(self.tree)

    def write(self, tree: Any) -> None:
        self.path.write_text(json.dumps(tree))

    def load(self) -> None:
        plan = Plan.load(self.path)
        assert str(plan)
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.widths is not None


class ModelFile(Target):
    """The description beside the tensors."""

    sparse = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with torch.no_grad():
            self.model[3].weight[:, :, 1:] = 0
        if self.sparse:
            fxprune.initialize(self.model, 3)
        budget = fxprune.Budget(channels=0.6, tolerance=0.3)
        self.compact = fxprune.prune(self.model, X, passes.Random(), budget=budget)
        fxprune.save(self.compact, self.path)
        with safetensors.safe_open(self.path, "pt") as file:
            self.description = json.loads(file.metadata()["fxprune"])
        self.tensors = safetensors.torch.load_file(self.path)
        self.tree = {"description": self.description, "tensors": self.tensors}
        self.expected = copy.deepcopy(self.compact.state_dict())

    def write(self, tree: Any) -> None:
        tensors = tree.get("tensors") if isinstance(tree, dict) else None
        tensors = tensors if isinstance(tensors, dict) else {}
        stored = {name: tensor.contiguous() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        description = tree.get("description") if isinstance(tree, dict) else tree
        safetensors.torch.save_file(stored, self.path, {"fxprune": json.dumps(description)})

    def load(self) -> None:
        loaded = fxprune.load(self.path, self.model)
        state = loaded.state_dict()
        assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
            name: (t.shape, t.dtype) for name, t in self.expected.items()
        }
        loaded(X)


class InitializedFile(ModelFile):
    sparse = True


class SessionFile(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        trained(folder).save(self.path)
        self.tree = torch.load(self.path, weights_only=True)
        self.optimizer = optimizer_of(self.model)

    def write(self, tree: Any) -> None:
        torch.save(tree, self.path)

    def load(self) -> None:
        model = copy.deepcopy(self.model)  # what is loaded well is cut
        with Session.load(self.path, model, X, optimizer_of(model), progress=False) as session:
            step(session)
            session.epoch_end()
            assert str(session.log)


class ProgressFile(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write_progress(trained(folder), folder)
        self.path = folder / "fxprune.pt"
        self.tree = torch.load(self.path, weights_only=True)

    def write(self, tree: Any) -> None:
        torch.save(tree, self.path)

    def load(self) -> None:
        state = read_progress(self.path.parent)
        model = copy.deepcopy(self.model)
        asked = [passes.PruneTrain(threshold=1e-3), Thin()]
        with Session(model, X, optimizer_of(model), asked, progress=False) as session:
            before = copy.deepcopy(session.graph.state_dict())
            try:
                resume_run(session, state)
            except fxprune.FxpruneError as error:
                torch.testing.assert_close(session.graph.state_dict(), before, rtol=0, atol=0)
                raise FileError(str(error)) from error
            step(session)
            session.epoch_end()


@pytest.mark.parametrize("every", [SAMPLE, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [PlanFile, ModelFile, InitializedFile, SessionFile, ProgressFile])
def test_every_field_of_every_format(kind: Callable[[Path], Any], every: int, tmp_path: Path) -> None:
    target = kind(tmp_path)
    target.load()
    before, random_numbers = target.unchanged(), torch.get_rng_state()
    outcomes = {"refused": 0, "loaded": 0}
    crashes = []
    for name, tree in variants(target.tree, every):
        target.write(tree)
        torch.set_rng_state(random_numbers)
        np.random.seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.load()
            outcomes["loaded"] += 1
        except FileError as error:
            outcomes["refused"] += 1
            if not str(error).strip():
                crashes.append(f"{name}: no message")
        except Exception as error:
            crashes.append(f"{name}: {type(error).__name__}: {error}"[:300])
        torch.testing.assert_close(target.model.state_dict(), before, rtol=0, atol=0)
    assert not crashes, f"{len(crashes)} of {sum(outcomes.values()) + len(crashes)}:\n" + "\n".join(crashes)
    assert outcomes["refused"] > outcomes["loaded"] // 4


def test_a_file_is_no_larger_than_the_model(tmp_path: Path) -> None:
    """A small file that says it has 10^9 weights: refused before they are made."""
    target = ModelFile(tmp_path)
    name = target.description["kernels"][0]
    target.tensors[f"{name}:pattern"] = torch.zeros(1000, 1000, dtype=torch.uint8)
    target.tensors[f"{name}:pool"] = torch.ones(1, 30, 30, dtype=torch.bool)
    target.write(target.tree)
    with pytest.raises(FileError, match=r"patterns of shape \(30, 30\) at \(1000, 1000\) places; in the model it has"):
        target.load()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("epoch",), 10**20, "its epoch is 100000000000000000000, which is no such number"),
        (("step",), -1, "its step is -1, which is no such number"),
        (("log", 0, "params"), 10**20, r"Epoch\.params is 100000000000000000000, which is damaged"),
        (("log", 0), 3, "3 stands where a Epoch should be"),
        (("passes", 0, "saved", "lambda"), {}, r"Lasso\.lambda_ is \{\}, which is damaged"),
        (
            ("optimizer", "state", 0, "exp_avg"),
            torch.zeros(3),
            r"'exp_avg' of 0\.weight is float\[3\] in the file",
        ),
        (("optimizer", "state", 0, "exp_avg"), LOST, r"state 'exp_avg' of 0\.weight is not in the file"),
        (
            ("optimizer", "state", 0, "step"),
            "one",
            r"'step' of 0\.weight is str in the file; it should be float\[\]",
        ),
        (("optimizer", "state", 0), 3, "the optimizer's state in the file is damaged"),
        (("optimizer", "param_groups", 0, "params"), [1, 0, 2, 3, 4, 5, 6, 7], "not numbered in order"),
        (
            ("optimizer", "param_groups", 0, "lr"),
            "fast",
            "setting 'lr' is 'fast' in the file, where one as 0.01",
        ),
        (
            ("optimizer", "param_groups", 0, "betas"),
            LOST,
            "step with the settings in the file: KeyError: 'betas'",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_a_cut(
    field: tuple[Any, ...], value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = SessionFile(tmp_path)
    target.write(replaced(target.tree, field, value))
    model = network()
    optimizer = optimizer_of(model)
    monkeypatch.setattr("fxprune.training.state.cut_run", None)
    with pytest.raises(FileError, match=message):
        Session.load(target.path, model, X, optimizer, [passes.PruneTrain(threshold=1e-3), Thin()], progress=False)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer.state
    torch.testing.assert_close(model.state_dict(), target.unchanged(), rtol=0, atol=0)


class Closing(torch.optim.SGD):
    """Asks for a closure, so it can't be tried on a copy."""

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise ValueError("give a closure")
        return super().step(closure)


def test_an_optimizer_that_can_not_be_tried_is_loaded(tmp_path: Path) -> None:
    model = network()
    with Session(model, X, Closing(model.parameters(), lr=0.1, momentum=0.9), progress=False) as session:
        session.save(tmp_path / "run.pt")
    model = network()
    with Session.load(tmp_path / "run.pt", model, X, Closing(model.parameters(), lr=0.2, momentum=0.9)) as session:
        assert session.optimizer.param_groups[0]["lr"] == 0.1
