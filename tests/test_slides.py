"""Reports: the summary's numbers stand on the page, charts stay in their frame, nothing comes from elsewhere."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_report import ATTACKS, Named, Page
from torch import Tensor, nn

import fxprune
from fxprune import Budget, passes
from fxprune.budget.staircase import find_tallest
from fxprune.errors import BenchError, FileError, PlanError
from fxprune.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, around, figure, ticks
from fxprune.report.slides import pictures
from fxprune.report.summary import Summary
from fxprune.training.log import Epoch, Log

X = torch.randn(2, 3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 4, 1))


def summarized(model: nn.Module | None = None, measure: bool = False) -> tuple[fxprune.Analysis, Summary]:
    analysis = fxprune.analyze(model or net(), X)
    plan = passes.Magnitude(round_to=1).plan(analysis, Budget(channels=0.6, tolerance=0.3))
    compact, _ = fxprune.rewrite(analysis.graph, analysis, plan)
    bench = None
    if measure:
        bench = fxprune.bench(analysis.graph, compact, X, batches=(2,), backends=("eager",), seconds=0.0)
    return analysis, fxprune.summarize(analysis, plan, compact, bench=bench, about={"model": "net & co"})


def run_of(analysis: fxprune.Analysis) -> Log:
    whole = dict(analysis.sizes)
    cut = {name: size - 2 for name, size in whole.items()}
    common = {"steps": 3, "samples": 4, "params": 9, "memory": 9.0, "lr": 0.1}
    return Log(
        Epoch(
            epoch=at, step_time=0.1 / at, flops=1e6 / at, widths=widths, removed=removed, saved=100.0 * at,
            norms=dict.fromkeys(widths, 0.1**at), values={"top 1": 0.5 + at / 10}, **common,
        )
        for at, widths, removed in ((1, whole, 4), (2, cut, 0), (3, cut, 0))
    )  # fmt: skip


def test_a_summary_counts() -> None:
    model = net()
    analysis, summary = summarized(model)
    before, after = summary.totals["params"]
    assert before == fxprune.cost.params(model)
    assert summary.totals["flops"][0] == fxprune.cost.flops(model, X)
    assert sum(each.flops[1] for each in summary.layers) == summary.totals["flops"][1]
    assert [each.name for each in summary.layers] == ["0", "3", "4"]
    first, second, third = summary.layers
    assert first.outputs == second.inputs == summary.groups["0"]
    assert second.outputs == third.inputs == summary.groups["3"]
    assert first.inputs == (3, 3)
    assert sum(each.params[1] for each in summary.layers) == after - 2 * first.outputs[1], "but for the norm"
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
    assert [each.kind for each in summary.layers] == ["Conv2d", "Own", "Conv2d"]
    assert all(each.flops[0] > each.flops[1] > 0 for each in summary.layers)
    for at in (0, 1):
        assert sum(each.flops[at] for each in summary.layers) == summary.totals["flops"][at]


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
        found = fxprune.summarize(analysis, plan, compact)
        assert found.groups[name][1] == 0
        assert any(each.outputs[1] == each.params[1] == each.flops[1] == 0 for each in found.layers)
        return
    pytest.fail("no group of this model can go whole")


def test_a_plan_of_another_model() -> None:
    analysis, _ = summarized()
    with pytest.raises(PlanError, match="made for another model"):
        fxprune.summarize(analysis, fxprune.Plan({}, {"z": 3}), analysis.graph)


def test_the_page(tmp_path: Path) -> None:
    analysis, summary = summarized(measure=True)
    stairs = fxprune.staircase(analysis, "0", widths=[4, 8, summary.groups["0"][1], 16], seconds=0.0)
    log = run_of(analysis)
    path = tmp_path / "report.html"
    summary.to_html(path, analysis, log=log, stairs=[stairs], accuracies={"dense": (0.2, 0.9), "half <b>": (0.1, 0.8)})
    text = path.read_text()
    page = Page(text)
    assert not re.findall(r"(?:src|href)=\"(?!#)", text), "nothing comes from elsewhere"
    for words in (
        "report on net &amp; co",
        "Median norm of",
        "top 1",
        "Accuracy against time",
        "half &lt;b&gt;",
        "eager",
    ):
        assert words in text
    assert "300 s saved" in text
    assert "chosen" in text
    assert text.count('class="cut"') == 5, "one cut, in each of the five charts of the run"
    for name, (before, after) in summary.groups.items():
        assert f'title="{name}: {before} → {after}"' in text
    assert page.text.keys() >= {f"g{at}" for at in range(len(summary.groups))}, "the graph with its groups is there"


def test_a_page_without_measurements() -> None:
    _, summary = summarized()
    assert "Measured" not in pictures(summary, None, (), {})
    assert "Measured" not in pictures(summary, Log(), (), {})


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


# ----------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "points",
    [
        [(1, 0.0)],
        [(1, 5.0), (2, 5.0)],
        [(0.001, 1e-9), (0.002, 1e9)],
        [(1, -3.0), (100, 7.0)],
        [(float(at), 0.3 + 0.01 * at) for at in range(80)],
    ],
)
def test_charts_stay_in_their_frame(points: Sequence[tuple[float, float]], log: bool) -> None:
    html = figure("a", [Series("", points), Series("b", points, stairs=True)], "x", "y", log=log, from_zero=False)
    assert html.count("<circle") == (0 if len(points) > 60 else 2 * len(points))
    for x, y in re.findall(r'cx="([\d.e+-]+)" cy="([\d.e+-]+)"', html):
        assert LEFT <= float(x) <= WIDTH - RIGHT
        assert TOP <= float(y) <= HEIGHT - BOTTOM
    assert "nan" not in html
    assert "inf" not in html


def test_higher_values_stand_higher() -> None:
    html = figure("a", [Series("", [(1, 1.0), (2, 3.0), (3, 2.0)])], "x", "y")
    (x1, y1), (x2, y2), (x3, y3) = (map(float, each) for each in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', html))
    assert x1 < x2 < x3
    assert y2 < y3 < y1


def test_no_points_no_chart() -> None:
    assert figure("a", [Series("", [])], "x", "y") == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.003, 0.0071), (-5, 1234), (7, 7)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 12
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    outside = around(low, high)
    assert outside[0] <= low + 1e-9
    assert outside[-1] >= high - 1e-9


# -------------------------------------------------------------------------------------------- staircase


def test_a_staircase() -> None:
    analysis = fxprune.analyze(net(), X)
    found = fxprune.staircase(analysis, "0", seconds=0.0)
    assert found.widths == tuple(range(2, 17, 2))
    assert all(seconds > 0 for seconds in found.seconds)
    assert find_tallest(analysis) == "0"
    assert analysis.graph.training


def test_a_wider_group_takes_longer() -> None:
    analysis = fxprune.analyze(
        nn.Sequential(nn.Conv2d(3, 256, 3), nn.Conv2d(256, 64, 3)).eval(), torch.randn(4, 3, 16, 16)
    )
    found = fxprune.staircase(analysis, "0", widths=(16, 256), seconds=0.1)
    assert found.seconds[1] > 2 * found.seconds[0]


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
    old = [{**each, "notes": []} for each in run_of(fxprune.analyze(net(), X)).to_json()]
    for each in old:
        each.pop("norms")
    assert not Log.from_json(old)[0].norms
