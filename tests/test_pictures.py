"""Reports: the summary's numbers stand on the page and in its pictures, and nothing comes from elsewhere."""

import copy
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from test_report import ATTACKS, Named, Page
from torch import Tensor, nn

import fxprune
from fxprune import Budget, passes
from fxprune.budget.staircase import Staircase, find_tallest
from fxprune.errors import BenchError, FileError, PlanError
from fxprune.report import pictures
from fxprune.report.summary import NO_PICTURES, Summary
from fxprune.training.log import Epoch, Log

X = torch.randn(2, 3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 4, 1))


def summarized(model: nn.Module | None = None, measure: bool = False) -> tuple[fxprune.Analysis, Summary]:
    analysis = fxprune.analyze(model or net(), X)
    plan = passes.Magnitude(scope="local", round_to=1).plan(analysis, Budget(channels=0.6, tolerance=0.3))
    compact, _ = fxprune.rewrite(analysis.graph, analysis, plan)
    bench = None
    if measure:
        bench = fxprune.bench(analysis.graph, compact, X, batches=(2,), backends=("eager",), seconds=0.0)
    return analysis, fxprune.summarize(analysis, plan, compact, bench=bench, about={"model": "net & co"})


def run_of(analysis: fxprune.Analysis) -> Log:
    dense = dict(analysis.sizes)
    cut = {name: size - 2 for name, size in dense.items()}
    common = {"steps": 3, "samples": 4, "params": 9, "memory": 9.0, "lr": 0.1}
    return Log(
        Epoch(
            epoch=at, step_time=0.1 / at, flops=1e6 / at, widths=widths, removed=removed, saved=100.0 * at,
            norms=dict.fromkeys(widths, 0.1**at), values={"top 1": 0.5 + at / 10}, **common,
        )
        for at, widths, removed in ((1, dense, 4), (2, cut, 0), (3, cut, 0))
    )  # fmt: skip


def test_a_summary_counts() -> None:
    model = net()
    analysis, summary = summarized(model)
    before, after = summary.totals["params"]
    assert before == fxprune.cost.params(model)
    assert summary.totals["flops"][0] == fxprune.cost.flops(model, X)
    assert sum(layer.flops[1] for layer in summary.layers) == summary.totals["flops"][1]
    assert [layer.name for layer in summary.layers] == ["0", "3", "4"]
    first, second, third = summary.layers
    assert first.outputs == second.inputs == summary.groups["0"]
    assert second.outputs == third.inputs == summary.groups["3"]
    assert first.inputs == (3, 3)
    assert sum(layer.params[1] for layer in summary.layers) == after - 2 * first.outputs[1], "but for the norm"
    assert summary.paths() == {"0": ["0", "3"], "3": ["3", "4"]}
    assert "16 → " in str(summary)
    assert analysis.graph.training, "modes are as before"


class Own(nn.Conv2d):
    """A layer of the user's own, which tracing goes through."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


def test_functions_count_for_the_layer_that_calls_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Sequential(Own(16, 8, 3)), nn.Conv2d(8, 4, 1))
    _, summary = summarized(model)
    assert [layer.kind for layer in summary.layers] == ["Conv2d", "Own", "Conv2d"]
    assert all(layer.flops[0] > layer.flops[1] > 0 for layer in summary.layers)
    for at in (0, 1):
        assert sum(layer.flops[at] for layer in summary.layers) == summary.totals["flops"][at]


def test_a_branch_that_is_gone_is_zero() -> None:
    from models import MODELS, prepare

    model, inputs = prepare(MODELS["residual"])
    analysis = fxprune.analyze(model, inputs)
    for name in analysis.groups:
        plan = fxprune.Plan({name: []}, analysis.sizes, analysis.options)
        try:
            compact, _ = fxprune.rewrite(analysis.graph, analysis, plan)
        except fxprune.FxpruneError:
            continue
        summary = fxprune.summarize(analysis, plan, compact)
        assert summary.groups[name][1] == 0
        assert any(layer.outputs[1] == layer.params[1] == layer.flops[1] == 0 for layer in summary.layers)
        return
    pytest.fail("no group of this model can go whole")


def test_a_plan_of_another_model() -> None:
    analysis, _ = summarized()
    with pytest.raises(PlanError, match="made for another model"):
        fxprune.summarize(analysis, fxprune.Plan({}, {"z": 3}), analysis.graph)


RESULTS = {"dense": (0.2, 0.9), "half <b>": (0.1, 0.8)}  # seconds and accuracy


def test_the_page(tmp_path: Path) -> None:
    analysis, summary = summarized(measure=True)
    stairs = fxprune.staircase(analysis, "0", widths=[4, 8, summary.groups["0"][1], 16], seconds=0.0)
    path = tmp_path / "report.html"
    summary.to_html(path, analysis, log=run_of(analysis), stairs=[stairs], accuracies=RESULTS)
    text = path.read_text()
    page = Page(text)
    assert not re.findall(r"(?:src|href)=\"(?!#)", text), "nothing comes from elsewhere"
    assert re.findall("<figcaption>(.*?)</figcaption><svg", text) == [
        "Channels of each group, before (pale) and after",
        "Time of the layers of 0, by its width",
        "The training run; dotted lines are cuts",
        "Accuracy against time",
    ]
    ids = page.all("id")
    assert len(ids) == len(set(ids)), "no two pictures share a clip or a marker"
    words = re.findall("<text[^>]*>([^<]*)</text>", text)
    changes = [f"{before} → {after}" for before, after in summary.groups.values()]
    words_shown = {*summary.groups, *changes, "chosen", "top 1", "ms a step; 300 s saved", "dense", "half &lt;b&gt;"}
    assert words_shown - set(words) == set(), "text can be found and copied"
    assert "report on net &amp; co" in text
    assert page.text.keys() >= {f"g{at}" for at in range(len(summary.groups))}, "the graph with its groups is there"


def test_the_tables_of_the_page_are_those_of_the_terminal(tmp_path: Path) -> None:
    analysis, summary = summarized(measure=True)
    summary.to_html(tmp_path / "report.html", analysis)
    text = (tmp_path / "report.html").read_text()
    rows = re.findall("<tr>(.*?)</tr>", text)
    cells = {" ".join(" ".join(re.findall("<t[hd]>(.*?)</t[hd]>", row)).split()) for row in rows}
    lines = {" ".join(line.split()) for line in f"{summary}\n{summary.bench}".splitlines()}
    assert summary.bench is not None
    assert lines - cells == {summary.bench.machine}
    assert all(f"<summary>{title}</summary>" in text for title in ("In all", "Time", "Layers"))


def test_a_page_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fxprune.report.pictures")
    analysis, summary = summarized()
    summary.to_html(tmp_path / "report.html", analysis, accuracies=RESULTS)
    text = (tmp_path / "report.html").read_text()
    assert text.count(NO_PICTURES) == 1
    assert "pip install 'fxprune[plots]'" in NO_PICTURES
    assert "<figure" not in text
    assert text.count("<table") == 2
    Page(text)


def test_a_page_without_measurements() -> None:
    _, summary = summarized()
    assert pictures.draw_pictures(summary.groups, None, (), {}).count("<figure") == 1
    assert pictures.draw_pictures(summary.groups, Log(), (), {}).count("<figure") == 1
    assert "<figure" not in pictures.draw_pictures({}, None, (), {})


def test_names_of_a_model_are_text(tmp_path: Path) -> None:
    analysis, summary = summarized(Named(ATTACKS))
    summary.to_html(tmp_path / "report.html", analysis)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<script") == 1
    assert "<img" not in text
    Page(text)


def test_nothing_can_be_written(tmp_path: Path) -> None:
    analysis, summary = summarized()
    with pytest.raises(FileError, match="can't write a page to"):
        summary.to_html(tmp_path / "no" / "report.html", analysis)


# --------------------------------------------------------------------------------------------- pictures


COLOURS = {"0": (1.0, 0.0, 0.0), "3": (0.0, 1.0, 0.0)}


def lines_of(axes: Axes) -> list[list[tuple[float, float]]]:
    return [list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines if line.get_linestyle() == "-"]


def test_bars_are_as_long_as_groups_are_wide() -> None:
    name = "a" * 100 + ".conv"
    (axes,) = pictures.draw_widths({"0": (16, 10), name: (8, 0)}, {"0": (1, 0, 0), name: (0, 1, 0)}).axes
    assert [bar.get_width() for bar in axes.patches] == [16, 8, 10, 0]
    assert [bar.get_facecolor() for bar in axes.patches][1::2] == [(0, 1, 0, 0.3), (0, 1, 0, 1)]
    assert [label.get_text() for label in axes.texts] == ["16 → 10", "8 → 0"]
    first, second = (label.get_text() for label in axes.get_yticklabels())
    assert first == "0"
    assert second.endswith(".conv")
    assert len(second) < 50
    bottom, top = axes.get_ylim()
    assert bottom > top, "the first group is on top"


@pytest.mark.parametrize(("chosen", "marks"), [(6, [[(6, 3.0)]]), (2, [])])
def test_the_chosen_width_stands_on_its_staircase(chosen: float, marks: list[list[tuple[float, float]]]) -> None:
    (axes,) = pictures.draw_staircase(Staircase("0", (4, 8), (0.002, 0.004)), chosen, (1, 0, 0)).axes
    line, *rest = axes.lines
    assert list(zip(*line.get_data(), strict=True)) == [(4, 2.0), (8, 4.0)]
    assert [list(zip(*mark.get_data(), strict=True)) for mark in rest] == marks
    assert [label.get_text() for label in axes.texts] == ["chosen"] * len(marks)


def test_a_run_by_epoch() -> None:
    log = run_of(fxprune.analyze(net(), X))
    panels = {axes.get_title(): axes for axes in pictures.draw_run(log, COLOURS).axes}
    assert {title: lines_of(axes) for title, axes in panels.items()} == {
        "ms a step; 300 s saved": [[(epoch.epoch, 1e3 * epoch.step_time) for epoch in log]],
        "FLOPs of a sample": [[(epoch.epoch, epoch.flops) for epoch in log]],
        "channels of each group": [[(1, 16), (2, 14), (3, 14)], [(1, 8), (2, 6), (3, 6)]],
        "median norm of the channels of each group": [[(epoch.epoch, 0.1**epoch.epoch) for epoch in log]] * 2,
        "top 1": [[(1, 0.6), (2, 0.7), (3, 0.8)]],
    }
    for axes in panels.values():
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [1.5], "the one cut"
    assert [line.get_color() for line in panels["channels of each group"].lines[:2]] == list(COLOURS.values())


def test_accuracy_against_time() -> None:
    (axes,) = pictures.draw_tradeoff(RESULTS).axes
    assert [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines] == [(200.0, 0.9), (100.0, 0.8)]
    assert {label.get_text(): label.xy for label in axes.texts} == {"dense": (200.0, 0.9), "half <b>": (100.0, 0.8)}


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1e9])
@pytest.mark.parametrize("name", ["_", "$x_{$", "層", "FLOPs of a sample"])
def test_odd_names_and_numbers_are_drawn(name: str, value: float) -> None:
    stairs = Staircase(name, (3,), (0.0,))
    common = {"steps": 1, "samples": None, "params": 1, "memory": 1.0, "lr": 0.1, "step_time": 0.0, "flops": 0.0}
    log = Log([Epoch(epoch=1, widths={name: 0}, norms={name: 0.0}, values={name: value}, **common)])
    html = pictures.draw_pictures({name: (3, 0)}, log, [stairs], {name: (0.0, value)})
    assert html.count("<figure") == 4
    assert f">{name}</text>" in html


def test_the_same_picture_is_the_same_text_and_no_setting_changes() -> None:
    before = dict(matplotlib.rcParams)
    first, second = (pictures.draw_pictures({"0": (16, 10)}, None, (), RESULTS) for _ in range(2))
    assert first == second
    assert dict(matplotlib.rcParams) == before
    assert pictures.INK not in first
    assert "currentColor" in first, "grey is that of the page's text, in the light and in the dark"
    assert not re.search(r"<metadata|\d{4}-\d\d-\d\d", first)


# -------------------------------------------------------------------------------------------- staircase


def test_a_staircase() -> None:
    analysis = fxprune.analyze(net(), X)
    stairs = fxprune.staircase(analysis, "0", seconds=0.0)
    assert stairs.widths == tuple(range(2, 17, 2))
    assert all(seconds > 0 for seconds in stairs.seconds)
    assert find_tallest(analysis) == "0"
    assert analysis.graph.training


def test_a_wider_group_takes_longer() -> None:
    analysis = fxprune.analyze(
        nn.Sequential(nn.Conv2d(3, 256, 3), nn.Conv2d(256, 64, 3)).eval(), torch.randn(4, 3, 16, 16)
    )
    stairs = fxprune.staircase(analysis, "0", widths=(16, 256), seconds=0.1)
    assert stairs.seconds[1] > 2 * stairs.seconds[0]


@pytest.mark.parametrize(
    ("group", "widths", "message"),
    [
        ("z", None, "no group is called 'z'; there are 0, 3"),
        ("0", (0, 4), r"group '0' has widths from 1 to 16; \[0, 4\] is not among them"),
        ("0", (17,), r"widths from 1 to 16; \[17\]"),
        ("0", (), r"widths from 1 to 16; \[\]"),
    ],
)
def test_a_staircase_of_nothing(group: str, widths: Sequence[int] | None, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        fxprune.staircase(fxprune.analyze(net(), X), group, widths=widths)


def test_the_log_has_the_norms_of_groups() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = copy.deepcopy(model)
    with fxprune.Session(model, X, optimizer, progress=False) as session:
        record = session.epoch_end()
    first, second = (expected.get_parameter(name).detach().double() for name in ("0.weight", "3.weight"))
    norms = (first.square().sum((1, 2, 3)) + second.square().sum((0, 2, 3))).sqrt()
    assert session.log[-1].norms["0"] == pytest.approx(float(norms.quantile(0.5)), rel=1e-6)
    assert record is None or session.log[-1].norms.keys() == {"0", "3"}
    assert Log.from_json(session.log.to_json())[-1].norms == session.log[-1].norms


def test_an_old_log_is_read() -> None:
    old = [{**entry, "notes": []} for entry in run_of(fxprune.analyze(net(), X)).to_json()]
    for entry in old:
        entry.pop("norms")
    assert not Log.from_json(old)[0].norms
