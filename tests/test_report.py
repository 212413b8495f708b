"""The page of an analysis: it names everything, needs nothing from elsewhere, and no name of a model is run."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from models import MODELS, prepare
from torch import Tensor, nn

import fxprune
from fxprune import Budget, FxpruneError, passes
from fxprune.errors import FileError
from fxprune.report.page import Report
from fxprune.report.rows import lay_out

VOID = {"html", "meta", "input", "br", "wbr", "path", "li"}  # opened and not closed
ATTACKS = (
    "<script>document['body']['id'] = 'attacked'</script>",
    "><img src=x onerror=document['body']['id']='attacked'>",
    "$summary & 'quoted' ${script}",
)
QUOTED = (
    """"><img src=x onerror="document['body']['id'] = 'attacked'">"""  # torch.fx can't trace a name with such quotes
)


class Page(HTMLParser):
    """What a browser makes of a page: attributes by element, and the text of each row and entry."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = dict[str, str]()  # of the entries by id, of the rows by number
        self.current: str | None = None
        self.rows = 0
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.attributes.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "details" and values["class"] in ("row", "entry"):
            self.rows += values["class"] == "row"
            self.current = values.get("id") or f"row {self.rows}"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("li", "path"):
            return
        assert self.open.pop() == tag
        if tag == "details":
            self.current = None

    def handle_data(self, data: str) -> None:
        if self.current:
            self.text[self.current] = self.text.get(self.current, "") + data

    def all(self, attribute: str) -> list[str]:
        return [value for _, values in self.attributes if (value := values.get(attribute)) is not None]


class Steered(nn.Module):
    """A loop that depends on data, a region, and a layer that plain Python calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
        self.head = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.head((self.body(x).mean((2, 3)) * self.scale).relu())


class Named(nn.Module):
    """Layers with the given names. ``steered``: plain Python calls them, and no graph has them."""

    def __init__(self, names: tuple[str, ...], steered: bool = False) -> None:
        super().__init__()
        self.steered = steered
        self.layers = nn.ModuleDict({name: nn.Conv2d(3, 3, 1) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        if self.steered and x.sum() > 1e9:
            return x
        for layer in self.layers.values():
            x = layer(x)
        return x


def page_of(analysis: fxprune.Analysis, folder: Path) -> tuple[str, Page]:
    path = folder / "page.html"
    assert analysis.to_html(path) is None
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def check(analysis: fxprune.Analysis, folder: Path) -> Page:
    """The page has every group, reason and parameter, and links only within itself."""
    text, page = page_of(analysis, folder)
    entries = {of: entry_text for of, entry_text in page.text.items() if not of.startswith("row")}
    for number, group in enumerate(analysis.groups.values()):
        entry = entries.pop(f"g{number}")
        assert entry.startswith(group.name)
        assert all(f"{member.parameter}[{member.axis}]" in entry for member in group.members)
        assert ("normalization" in entry) == group.inexact
    for frozen in analysis.frozen:
        entry = next(entry_text for entry_text in entries.values() if entry_text.startswith(frozen.reason.text))
        assert (
            f"{frozen.parameter}[{frozen.axis}]: {len(frozen.index)} frozen: {analysis.place(frozen.reason)}" in entry
        )
    assert set(entries) == {f"f{number}" for number in range(len({frozen.reason.text for frozen in analysis.frozen}))}
    rows = "".join(entry_text for of, entry_text in page.text.items() if of.startswith("row"))
    for name, first in analysis.aliases.items():
        same = f" (the same tensor as {first})" if name != first else ""
        for axis in range(len(analysis.shapes[name])):
            assert f"{name}[{axis}]{same}" in rows or (first, axis) not in analysis.axes
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    assert set(page.all("data-of")) | set(" ".join(page.all("data-in")).split()) <= set(ids)
    assert {link[1:] for link in page.all("href")} <= set(ids)
    assert page.all("src") == []
    assert not re.search(r"https?:|url\(|@import|\bfetch\b", text.replace("http-equiv", ""))
    return page


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_on_the_page(name: str, tmp_path: Path) -> None:
    model, inputs = prepare(MODELS[name])
    check(fxprune.analyze(model, inputs), tmp_path)


def test_the_page_of_a_compact_model(tmp_path: Path) -> None:
    model, inputs = prepare(MODELS["residual"])
    graph = fxprune.trace(model, inputs)
    analysis = fxprune.analyze(graph, inputs)
    plan = passes.Random().plan(analysis, Budget(channels=0.5, tolerance=0.3))
    compact, _ = fxprune.rewrite(graph, analysis, plan)
    check(analysis.after(plan, compact), tmp_path)


def test_bars_are_what_a_node_gives() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
    analysis = fxprune.analyze(model, torch.zeros(1, 3, 8, 8))
    (region,) = fxprune.graph.traced.regions_of(analysis.graph).values()
    rows = list(Report(analysis).rows("", region))
    assert [(row.name, row.kind, row.gives) for row in rows[1:]] == [
        ("0", "Conv2d", [((6, "g0", "group 0"),)]),
        ("1", "ReLU", [((6, "g0", "group 0"),)]),
        ("2", "Conv2d", [((5, "f2", "frozen: output"),)]),
        ("output", "output", [((5, "f2", "frozen: output"),)]),
    ]
    assert rows[1].axes[1] == ("0.weight[1]", ((3, "f0", "frozen: meets input input"),))


def test_regions_and_what_stands_between_them(tmp_path: Path) -> None:
    page = check(fxprune.analyze(Steered().eval(), torch.zeros(1, 3, 8, 8)), tmp_path)
    text = (tmp_path / "page.html").read_text()
    assert "plain Python steers them" in text
    assert "<h2>body</h2>" in text
    assert text.index("In no graph") < text.index('">head</span>')
    assert any(entry.startswith("the modelSteered") for entry in page.text.values())


@pytest.mark.parametrize(("names", "steered"), [(ATTACKS, False), ((QUOTED, *ATTACKS), True)])
def test_names_are_text(names: tuple[str, ...], steered: bool, tmp_path: Path) -> None:
    analysis = fxprune.analyze(Named(names, steered).eval(), torch.zeros(1, 3, 4, 4))
    page = check(analysis, tmp_path)
    assert [tag for tag, _ in page.attributes].count("script") == 1
    assert "img" not in [tag for tag, _ in page.attributes]
    assert not [name for _, attributes in page.attributes for name in attributes if name.startswith("on")]


def test_a_page_that_can_not_be_written(tmp_path: Path) -> None:
    analysis = fxprune.analyze(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3))
    with pytest.raises(FileError, match=r"can't write a page to .*missing/page.html: No such file or directory"):
        analysis.to_html(tmp_path / "missing" / "page.html")
    with pytest.raises(FileError, match=r"can't write a page to .*: Is a directory"):
        analysis.to_html(tmp_path)
    with pytest.raises(FxpruneError, match="path must be a str or Path, but it is 3"):
        analysis.to_html(3)  # type: ignore[arg-type]


def test_a_residual_branch_gets_a_lane_of_its_own() -> None:
    lanes = lay_out([[], [0], [1], [0, 2], [3]])
    assert [lane.at for lane in lanes] == [0, 1, 1, 0, 0]
    assert [lane.past for lane in lanes] == [[], [0], [0], [], []]
    assert {lane.width for lane in lanes} == {2}


@pytest.mark.parametrize("seed", range(20))
def test_values_that_are_alive_at_once_have_different_lanes(seed: int) -> None:
    draw = random.Random(seed)
    reads = [sorted(set(draw.choices(range(at), k=draw.randrange(4)))) if at else [] for at in range(30)]
    lanes = lay_out(reads)
    for at, lane in enumerate(lanes):
        alive = [source for source in range(at) if any(source in reads[later] for later in range(at + 1, 30))]
        assert lane.past == sorted({lanes[source].at for source in alive})
        assert len(lane.past) == len(alive), "no two share a lane"
        assert lane.at not in lane.past
        assert lane.reads == sorted({lanes[source].at for source in reads[at]})


DRIVE = """
  const count = selector => all(selector).length;
  const state = () => [
    count(".row.hit"), count(".row:not([hidden])"), by("status").textContent, count(".entry.picked")].join("|");
  const log = [];
  all("#graphs .row .g")[0].click(); log.push(state());
  by("next").click(); log.push(document.activeElement.parentElement === all(".row.hit")[0]);
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" })); log.push(state());
  search.value = "layers.1"; search.dispatchEvent(new Event("input")); log.push(state());
  clear(); by("f0").firstElementChild.click(); log.push(by("f0").open, state());
  by("f0").firstElementChild.click(); log.push(by("f0").open, state());
  document.documentElement.dataset.log = log.join(" / ");
"""


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    options = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"

    def opened(page: Path, fragment: str = "") -> str:
        command = [chromium, *(f"--{option}" for option in options.split()), f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [*command, "--dump-dom", page.as_uri() + fragment], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    hostile = tmp_path / "hostile.html"
    fxprune.analyze(Named(ATTACKS), torch.zeros(1, 3, 4, 4)).to_html(hostile)
    html = opened(hostile, "#g0")
    assert 'data-ready="5"' in html, "the page's own script ran, and saw every row"
    assert 'id="attacked"' not in html
    assert html.count('class="row hit"') == 2, "g0 is picked: its two layers"

    page = tmp_path / "page.html"
    fxprune.analyze(Named(("0", "1", "2")), torch.zeros(1, 3, 4, 4)).to_html(page)
    text = re.sub("<meta http-equiv.*?>", "", page.read_text()).replace("</script>", DRIVE + "</script>")
    page.write_text(text)
    log = re.search('data-log="(.*?)"', opened(page))
    assert log
    assert log[1].split(" / ") == [
        "2|5|Group layers.0, 3 channels, in 2 rows|1",
        "true",
        "0|5||0",
        "0|2|2 rows and 2 groups or reasons match|0",
        "true",
        "1|5|Frozen: meets input x, 1 axis, in 1 row|1",
        "false",
        "0|5||0",
    ]
