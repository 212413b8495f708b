"""Hidden units of recurrent layers and cells go as others do: the compact layer is the masked original, sliced."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import randomize
from torch import Tensor, nn

import fxprune
from fxprune import cost, passes

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Steps(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, layer: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(4, 8), layer, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x))[0])


class Cells(Steps):
    """A cell that Python calls step by step."""

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in self.before(x).unbind(1):
            state = self.layer(step) if state is None else self.layer(step, state)
        return self.after(state[0] if isinstance(state, tuple) else state)


class Started(Steps):
    """The first state comes from the input."""

    def forward(self, x: Tensor) -> Tensor:
        start = self.before(x).mean(1).repeat(1, 2)[None]
        return self.after(self.layer(self.before(x), start)[0])


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Steps(nn.LSTM(8, 16, 2, batch_first=True)),
    "lstm, both directions": lambda: Steps(nn.LSTM(8, 16, bidirectional=True), 32),
    "lstm, projected": lambda: Steps(nn.LSTM(8, 16, 2, proj_size=6), 6),
    "lstm, dropout": lambda: Steps(nn.LSTM(8, 16, 2, dropout=0.5)),
    "gru": lambda: Steps(nn.GRU(8, 16, bias=False)),
    "gru, two layers and directions": lambda: Steps(nn.GRU(8, 16, 2, batch_first=True, bidirectional=True), 32),
    "gru, started": lambda: Started(nn.GRU(8, 16, batch_first=True)),
    "rnn": lambda: Steps(nn.RNN(8, 16, nonlinearity="relu")),
    "lstm cell": lambda: Cells(nn.LSTMCell(8, 16)),
    "gru cell": lambda: Cells(nn.GRUCell(8, 16)),
    "rnn cell": lambda: Cells(nn.RNNCell(8, 16)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_hidden_units_are_pruned(name: str) -> None:
    torch.manual_seed(0)
    model = randomize(MAKERS[name]()).double()
    analysis = fxprune.analyze(model, X)
    plan = passes.Random().plan(analysis, fxprune.Budget(params=0.6, tolerance=0.1))
    compact, param_map = fxprune.rewrite(analysis.graph, analysis, plan)
    result = fxprune.verify(analysis.graph, compact, param_map, X)  # raises where they differ
    assert result.moved > 1e-3
    layer = compact.get_submodule("layer")
    assert layer.hidden_size < 16 or 0 < layer.proj_size < 6
    assert compact(X[:1]).shape == model(X[:1]).shape
    assert compact.get_submodule("layer").input_size == compact.get_submodule("before").out_features


def test_a_state_that_is_a_constant_holds_its_units() -> None:
    class Constant(Steps):
        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.layer(self.before(x), torch.ones(1, 5, 16, dtype=x.dtype))[0])

    analysis = fxprune.analyze(Constant(nn.GRU(8, 16)).double(), X)
    assert list(analysis.sizes) == ["before"]
    assert "frozen: meets" in analysis.explain("layer.weight_hh_l0")


def test_steps_of_a_cell_are_all_counted() -> None:
    model = Cells(nn.GRUCell(8, 16)).double()
    analysis = fxprune.analyze(model, X)
    plan = passes.Random().plan(analysis, fxprune.Budget(flops=0.5, tolerance=0.05))
    compact, _ = fxprune.rewrite(analysis.graph, analysis, plan)
    assert 0.475 <= cost.flops(compact, X) / cost.flops(model, X) <= 0.5
