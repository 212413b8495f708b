"""Pipelines: anyone's rewrite passes, each checked right after it ran."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, prepare
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import fxprune
from fxprune import Budget, Pipeline, TracedModule, passes
from fxprune.errors import PassError


def traced(name: str = "residual") -> tuple[TracedModule, Any]:
    model, inputs = prepare(MODELS[name])
    return fxprune.trace(model, inputs), inputs


def code(graph: TracedModule) -> list[str]:
    return [part.python_code("self").src for part in graph.distinct_graphs().values()]


def relus(graph: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), nn.ReLU)
    ]


class ReluTwice(PassBase):
    """Harmless: a ReLU of a ReLU is a ReLU."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in relus(graph_module):
            with graph_module.graph.inserting_after(node):
                again = graph_module.graph.call_function(torch.relu, (node,))
            node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)
        return PassResult(graph_module, True)


class Nothing(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, False)


class Lies(ReluTwice):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(super().call(graph_module).graph_module, False)


class Fails(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        raise KeyError("no such layer")


class NoRelu(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in relus(graph_module):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
        return PassResult(graph_module, True)


class Doubles(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        with graph_module.graph.inserting_before(output):
            output.args = (graph_module.graph.call_function(torch.mul, (output.args[0], 2)),)
        return PassResult(graph_module, True)


class NoHead(PassBase):
    """Returns what goes into the last layer."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        output.args = (output.args[0].args[0],)
        return PassResult(graph_module, True)


class UseBeforeDefinition(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        first, second = [node for node in graph_module.graph.nodes if node.op == "call_module"][:2]
        first.args = (second,)
        return PassResult(graph_module, True)


class UnknownMethod(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        node = relus(graph_module)[0]
        with graph_module.graph.inserting_after(node):
            new = graph_module.graph.call_method("rectify", (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return PassResult(graph_module, True)


class NaNs(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        with graph_module.graph.inserting_before(output):
            output.args = (graph_module.graph.call_function(torch.mul, (output.args[0], float("nan"))),)
        return PassResult(graph_module, True)


def test_any_pass_runs_and_the_original_is_untouched() -> None:
    graph, inputs = traced()
    before, weights = code(graph), copy.deepcopy(graph.state_dict())
    pipeline = Pipeline([ReluTwice(), Nothing(), ReluTwice()], inputs)
    result = pipeline(graph)
    assert result.modified
    assert isinstance(result.graph_module, TracedModule)
    assert code(graph) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in graph.state_dict().items())
    assert "relu" in code(result.graph_module)[0]
    torch.testing.assert_close(result.graph_module(*inputs), graph(*inputs))
    assert [(step.name, step.modified) for step in pipeline.steps] == [
        ("ReluTwice", True),
        ("Nothing", False),
        ("ReluTwice", True),
    ]
    assert str(pipeline.steps[1]).startswith("Nothing: left the graph as it was in 0.")
    assert str(pipeline.steps[0]).endswith("outputs equal to 0.0e+00")
    assert not Pipeline([Nothing()], inputs)(graph).modified


def test_functions_are_passes_too() -> None:
    graph, inputs = traced()

    def in_place(module: fx.GraphModule) -> None:
        ReluTwice().call(module)

    def another_module(module: fx.GraphModule) -> fx.GraphModule:
        new = fx.GraphModule(module, copy.deepcopy(module.graph))
        new.add_submodule("extra", nn.Identity())
        output = next(node for node in new.graph.nodes if node.op == "output")
        with new.graph.inserting_before(output):
            output.args = (new.graph.call_module("extra", (output.args[0],)),)
        return new

    pipeline = Pipeline([in_place, another_module], inputs)
    compact = pipeline(graph).graph_module
    assert [step.name for step in pipeline.steps] == ["in_place", "another_module"]
    assert all(step.modified for step in pipeline.steps)
    assert "self.extra" in code(compact)[0]
    assert list(compact.state_dict()) == list(graph.state_dict())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["auxiliary_head", "dropout"])
def test_a_model_with_two_graphs(name: str, training: bool) -> None:
    graph, inputs = traced(name)
    graph.train(training)
    assert len(graph.distinct_graphs()) == 2
    result = Pipeline([ReluTwice()], inputs)(graph).graph_module
    assert result.training == training
    before = [text.count("relu") for text in code(graph)]
    after = [text.count("relu") for text in code(result)]
    assert all(a > b for a, b in zip(after, before, strict=True)), "both graphs are rewritten"
    result.eval(), graph.eval()
    torch.testing.assert_close(result(*inputs), graph(*inputs))


def test_pruned_and_rewritten() -> None:
    graph, inputs = traced()
    compact = fxprune.prune(graph, inputs, passes.Random(), budget=Budget(channels=0.6, tolerance=0.2))
    torch.testing.assert_close(Pipeline([ReluTwice()], inputs)(compact).graph_module(*inputs), compact(*inputs))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Fails(), r"pass Fails \(after Nothing, ReluTwice\) failed: KeyError: 'no such layer'"),
        (Lies(), r"pass Lies \(after Nothing, ReluTwice\) says it changed nothing, but the graph is another one"),
        (Doubles(), r"pass Doubles \(after .*\) changed the outputs in eval mode by \d.\d\de.\d\d \(relative\)"),
        (NaNs(), r"pass NaNs \(after .*\) changed the outputs in eval mode by nan"),
        (
            NoHead(),
            r"pass NoHead \(after .*\) changed the output shapes in eval mode from \[\(2, 4\)\] to \[\(2, 8\)\]",
        ),
        (UseBeforeDefinition(), r"pass UseBeforeDefinition \(after .*\) failed: RuntimeError: .* used before"),
        (UnknownMethod(), r"pass UnknownMethod \(after .*\) broke the graph: in eval mode it does not run: .*rectify"),
    ],
)
def test_a_bad_pass_is_named_with_those_before(bad: PassBase, message: str) -> None:
    graph, inputs = traced()
    before = code(graph)
    with pytest.raises(PassError, match=f"(?s){message}"):
        Pipeline([Nothing(), ReluTwice(), bad], inputs)(graph)
    assert code(graph) == before


def test_the_first_pass_and_train_mode() -> None:
    graph, inputs = traced("auxiliary_head")

    class NoReluInTraining(NoRelu):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            return super().call(graph_module) if graph_module.training else PassResult(graph_module, False)

    with pytest.raises(PassError, match=r"pass NoReluInTraining \(the first\) changed the outputs in train mode by"):
        Pipeline([NoReluInTraining()], inputs)(graph)
    NoReluInTraining.inference_only = True  # type: ignore[attr-defined]
    Pipeline([NoReluInTraining()], inputs)(graph)


def test_example_inputs_that_do_not_fit_are_not_the_fault_of_a_pass() -> None:
    graph, _ = traced()
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 5 channels"):
        Pipeline([Nothing()], torch.randn(2, 5, 8, 8))(graph)


# ------------------------------------------------------------------------------------------------- dumps


def test_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_DUMP", str(tmp_path / "dump"))
    graph, inputs = traced("auxiliary_head")
    Pipeline([Nothing(), ReluTwice()], inputs)(graph)
    files = {path.name: path.read_text() for path in (tmp_path / "dump").iterdir()}
    assert sorted(files) == [
        *("000_before.html", "000_before.txt", "001_Nothing.html", "001_Nothing.txt"),
        *("002_ReluTwice.html", "002_ReluTwice.txt", "index.html"),
    ]
    assert "# eval graph" in files["002_ReluTwice.txt"]
    assert "# train graph" in files["002_ReluTwice.txt"]
    assert "torch.relu" in files["002_ReluTwice.txt"]
    assert "torch.relu" not in files["001_Nothing.txt"]
    assert str(fxprune.analyze(graph, inputs)) in files["000_before.txt"]
    page = files["index.html"]
    assert page.startswith("<!doctype html>")
    assert "ReluTwice" in page
    assert 'href="002_ReluTwice.html"' in page
    assert "<summary>" in files["002_ReluTwice.html"]
    assert "http" not in page, "the page needs nothing from elsewhere"


def test_dump_of_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_DUMP", str(tmp_path))
    graph, inputs = traced()
    fxprune.prune(graph, inputs, passes.Random(), budget=Budget(channels=0.6, tolerance=0.2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("000_plan.html", "000_plan.txt", "001_compact.html", "001_compact.txt", "index.html")
    ]
    assert "# plan\nplan for " in (tmp_path / "000_plan.txt").read_text()


def test_a_dump_says_why_there_are_no_groups(tmp_path: Path) -> None:
    from fxprune.report.dump import Dump

    graph, _ = traced()
    Dump(tmp_path, torch.randn(2, 5, 8, 8)).write("a / b", graph)
    assert "does not run on channel names" in (tmp_path / "000_a_b.txt").read_text()


def test_no_dump_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXPRUNE_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    graph, inputs = traced()
    Pipeline([Nothing()], inputs)(graph)
    assert not list(tmp_path.iterdir())
