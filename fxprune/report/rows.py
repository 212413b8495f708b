"""Rows: the rows, bars and lanes of a graph as HTML. Every text that comes from a model is escaped here."""

import itertools
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple


class Part(NamedTuple):
    """Some channels of a bar: how many, the id of their group or reason on the page, and what it is called."""

    size: int
    of: str  # "g3" is the fourth group, "f0" the first reason
    text: str


Parts = tuple[Part, ...]


class Lanes(NamedTuple):
    """The lines beside a row: its own lane, those that it reads, and those in use above, beside and below it."""

    width: int  # lanes in the whole graph
    at: int
    reads: list[int]
    above: list[int]
    past: list[int]
    below: list[int]


class NodeRow(NamedTuple):
    """One node, or a layer that stands in no graph."""

    name: str
    kind: str
    scope: tuple[str, ...]  # the path of the module that it stands in
    about: str
    gives: list[Parts]  # the channels of its result
    axes: list[tuple[str, Parts]]  # those of its parameters
    lanes: Lanes | None

    @property
    def touches(self) -> dict[str, Part]:
        """The groups and reasons of its result and parameters, by their ids."""
        return {
            part.of: part
            for parts in (*self.gives, *(parts_of_axis for _, parts_of_axis in self.axes))
            for part in parts
        }


def lay_out(reads: Sequence[Sequence[int]]) -> list[Lanes]:
    """Give each row a lane, from the row itself to the last that reads it. ``reads[i]``: the rows that row i reads."""
    last = {source: at for at, sources in enumerate(reads) for source in sources}
    lane_of = dict[int, int]()
    until = dict[int, int]()  # lane -> the last row that reads it
    result = []
    for at, sources in enumerate(reads):
        above, sources_above = sorted(until), sorted({lane_of[source] for source in sources})
        until = {lane: end for lane, end in until.items() if end > at}
        past = sorted(until)
        lane_of[at] = next(lane for lane in itertools.chain(sources_above, itertools.count()) if lane not in until)
        if at in last:
            until[lane_of[at]] = last[at]
        result.append(Lanes(0, lane_of[at], sources_above, above, past, sorted(until)))
    width = max(lane_of.values(), default=-1) + 1
    return [lanes._replace(width=width) for lanes in result]


def write_section(title: str, about: str, rows: Sequence[NodeRow], is_open: bool = True) -> str:
    """A graph, or the layers that stand in none."""
    width = next((row.lanes.width for row in rows if row.lanes), 0)
    return (
        f'<section style="--lanes:{width}"><h2>{escape(title)}</h2><p>{escape(about)}</p>'
        f"{nest_rows(rows, is_open)}</section>"
    )


def nest_rows(rows: Sequence[NodeRow], is_open: bool, depth: int = 0, level: int = 0, outer: str = "") -> str:
    """Rows, with those of one module in a fold where they are at least three and not all.

    Folds within folds start closed unless ``is_open``. ``outer``: how the names in a fold start; that is shown once.
    """
    html = list[str]()
    for scope, run in itertools.groupby(rows, lambda row: row.scope[: depth + 1]):
        members = list(run)
        if len(scope) <= depth:
            html += (unfold_row(row, outer) for row in members)
        elif len(members) < 3 or len(members) == len(rows):
            html.append(nest_rows(members, is_open, depth + 1, level, outer))
        else:
            groups = {of: part for row in members for of, part in row.touches.items() if of[0] == "g"}
            swatches = "".join(map(draw_swatch, itertools.islice(groups.values(), 12)))
            html.append(
                f'<details class="fold" style="--in:{level + 1}"{" open" if is_open or not level else ""}><summary>'
                f"{draw_above(members[0].lanes)}{shorten_path('.'.join(scope), outer)}"
                f'<span class="kind">{len(members)} nodes</span><span class="bars">{swatches}</span></summary>'
                f"{nest_rows(members, is_open, depth + 1, level + 1, '.'.join(scope) + '.')}</details>"
            )
    return "".join(html)


def unfold_row(row: NodeRow, outer: str) -> str:
    """A row that opens: what it gives and the axes of its parameters, in bars and in words."""
    lines = dict[Parts, list[str]]()  # axes of the same channels share a line
    for title, parts in (*(("what it gives", parts) for parts in row.gives), *row.axes):
        lines.setdefault(parts, []).append(title)
    items = "".join(
        f"<li><code>{break_words(', '.join(titles))}</code>{draw_bar(parts)}<span>{word_parts(parts)}</span>"
        for parts, titles in lines.items()
    )
    shown = row.gives[:4]
    sizes = " × ".join(str(sum(part.size for part in parts)) for parts in shown)
    return (
        f'<details class="row" data-in="{" ".join(row.touches)}"><summary>{draw_beside(row.lanes)}'
        f'{shorten_path(row.name, outer)}<span class="kind">{break_words(row.kind)}</span>'
        f'<span class="bars">{"".join(map(draw_bar, shown))}{sizes}</span>'
        f'<span class="says">{break_words(say_bars(shown))}</span></summary>'
        f'<div class="more">{draw_below(row.lanes)}<div><p>{escape(row.about)}</p><ul>{items}</ul></div></div>'
        "</details>\n"
    )


def say_bars(bars: Sequence[Parts]) -> str:
    """The gist of some bars in words: which group, or how many, and why the rest is frozen."""
    texts = {part.of: part.text for parts in bars for part in parts}
    groups = [text for of, text in texts.items() if of[0] == "g"]
    frozen = [text for of, text in texts.items() if of[0] == "f"]
    return ", ".join((groups if len(groups) < 2 else [f"{len(groups)} groups"]) + frozen)


def draw_beside(lanes: Lanes | None) -> str:
    """The lines beside a row: what passes it, what it reads, what it gives; and its dot."""
    if not lanes:
        return ""
    dot_down = f"M{lanes.at + 0.5} 1V2" if lanes.at in lanes.below else ""
    reads = "".join(f"M{lane + 0.5} 0Q{lane + 0.5} 1 {lanes.at + 0.5} 1" for lane in lanes.reads)
    return draw_gutter(lanes, draw_down(lanes.past) + reads + dot_down, f'<i class="dot" style="--at:{lanes.at}"></i>')


def draw_above(lanes: Lanes | None) -> str:
    """The lines above a row."""
    return draw_gutter(lanes, draw_down(lanes.above)) if lanes else ""


def draw_below(lanes: Lanes | None) -> str:
    """The lines below a row."""
    return draw_gutter(lanes, draw_down(lanes.below)) if lanes else ""


def draw_down(lanes: Iterable[int]) -> str:
    """The path of lanes that only pass."""
    return "".join(f"M{lane + 0.5} 0V2" for lane in lanes)


def draw_gutter(lanes: Lanes, path: str, dot: str = "") -> str:
    """Lines, stretched to the height of what they stand beside."""
    return (
        f'<span class="gutter" aria-hidden="true"><svg viewBox="0 0 {lanes.width} 2" preserveAspectRatio="none">'
        f'<path d="{path}"/></svg>{dot}</span>'
    )


def draw_bar(parts: Parts) -> str:
    """Channels as a bar whose length grows with the square root of their number."""
    width = 3 * math.sqrt(sum(part.size for part in parts))
    pieces = "".join(
        f'<b class="{part.of[0]} {part.of}" data-of="{part.of}" style="flex-grow:{part.size}" '
        f'title="{part.size} {escape(part.text)}"></b>'
        for part in parts
    )
    label = escape(say_bars([parts]))
    return f'<span class="bar" role="img" aria-label="{label}" style="width:{width:.0f}px">{pieces}</span>'


def word_parts(parts: Parts) -> str:
    """Channels in words, with links to the groups and reasons."""
    return ", ".join(
        f'{part.size} <a href="#{part.of}" data-of="{part.of}">{break_words(part.text)}</a>' for part in parts
    )


def draw_swatch(part: Part) -> str:
    """The colour of a group."""
    return f'<b class="swatch {part.of[0]} {part.of}" data-of="{part.of}" title="{escape(part.text)}"></b>'


def write_entry(of: str, name: str, size: str, about: str, members: Iterable[str]) -> str:
    """A group or a reason in the lists beside the graphs."""
    lines = "".join(f"<li><code>{break_words(member)}</code>" for member in members)
    return (
        f'<details class="entry" id="{of}"><summary><b class="swatch {of[0]} {of}"></b>'
        f'<span class="name">{break_words(name)}</span><span class="kind">{size}</span></summary>'
        f"<p>{escape(about)}</p><ul>{lines}</ul></details>\n"
    )


def shorten_path(name: str, outer: str) -> str:
    """A name, of which what every name in the fold starts with is not shown."""
    inner = name.removeprefix(outer)
    hidden = f'<span class="outer">{break_words(outer)}</span>' if inner != name else ""
    return f'<span class="name">{hidden}{break_words(inner)}</span>'


def break_words(text: str) -> str:
    """A text that may break after its dots."""
    return escape(text).replace(".", ".<wbr>")


def count_noun(number: int, one: str, many: str) -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else many}"


def choose_hue(number: int) -> float:
    """The hue of a group in degrees: neighbours differ by the golden angle."""
    return number * 137.5 % 360
