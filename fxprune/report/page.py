"""Report: an analysis as one HTML page that needs nothing from elsewhere.

Each graph is drawn from top to bottom, a row a node, with the values that are alive in lanes at its left. A bar gives
the channels of a node: the colour of a group for those that can be pruned, hatched for the frozen ones.
"""

import base64
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from string import Template

from torch import fx

from fxprune.atomic import replace_file
from fxprune.channels.analysis import Analysis
from fxprune.channels.names import Ints
from fxprune.channels.values import Value, values_in
from fxprune.graph.places import describe_place
from fxprune.graph.traced import Mode, TracedModule, regions_of
from fxprune.report.rows import Lanes, NodeRow, Part, Parts, choose_hue, count_noun, lay_out, write_entry, write_section

LARGE = 120  # nodes: in a graph with more of them what is nested in nested modules starts folded
HEADING = "Channels that belong together"
STEERED = " torch.fx can't follow the whole model: its parts are graphs, and plain Python steers them."


def write_html(analysis: Analysis, path: str | Path, title: str = "", above: str = "") -> None:
    """Write the page of ``analysis``, the HTML ``above`` over it. Raises FileError where nothing can be written."""
    with replace_file(path, "a page") as partial:
        page = Report(analysis).page(title, above)
        partial.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


class Report:
    """Makes the page of one analysis."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.groups = list(analysis.groups.values())
        self.group_of = dict[int, int]()  # the name that stands for a channel -> the number of its group
        for number, group in enumerate(self.groups):
            self.group_of.update(dict.fromkeys(group.roots.tolist(), number))
        self.reasons = dict[str, int]()  # the text of a reason -> its number on the page
        self.inside = dict[str, list[str]]()  # a module or parameter -> the parameters and buffers in it
        for name in analysis.shapes:
            for path in itertools.accumulate(name.split("."), "{}.{}".format):
                self.inside.setdefault(path, []).append(name)
        self.shown = set[str]()  # parameters and buffers that some row has
        self.known = dict[int, Parts]()

    def page(self, title: str = "", above: str = "") -> str:
        """The whole page; ``above`` is HTML that stands over the graph."""
        template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        script = template.partition("<script>")[2].partition("</script>")[0]
        graphs = "".join([*self.graphs(), *self.outside()])
        return Template(template).substitute(
            script=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # no other script may run
            colours="".join(f".g{number}{{--h:{choose_hue(number):.0f}}}" for number in range(len(self.groups))),
            title=escape(title or "channels"),
            heading=escape(title or HEADING),
            subheading=f"<h2>{HEADING}</h2>" if title else "",
            above=above,
            summary=str(self.analysis).partition("\n")[0] + ".",
            steered="" if isinstance(self.analysis.graph, TracedModule) else STEERED,
            graphs=graphs,
            groups="".join(self.group_entries()) or "<p>None.</p>",
            frozen="".join(self.frozen_entries()) or "<p>None.</p>",
        )

    def graphs(self) -> Iterator[str]:
        """The graphs, in the order in which they are called."""
        parts = regions_of(self.analysis.graph)
        for path in dict.fromkeys([*self.analysis.inputs[Mode.EVAL], *parts]):
            if path in parts:
                module = parts[path]
                rows = list(self.rows(path, module))
                both = len(module.distinct_graphs()) == 1
                title = path or "The graph"
                yield write_section(title if both else f"{title}, in eval mode", "", rows, is_open=len(rows) <= LARGE)

    def rows(self, region: str, module: TracedModule) -> Iterator[NodeRow]:
        """The nodes of a graph in eval mode, but for those that compute sizes and no tensors."""
        values = self.analysis.values[Mode.EVAL].get(region, {})
        nodes = dict[fx.Node, list[Value]]()
        for node in module.graphs[Mode.EVAL].nodes:
            node_values = values_in(values.get(node.name))
            if node_values or node.name not in values or node.op in ("placeholder", "output"):
                nodes[node] = node_values
        number = {node: at for at, node in enumerate(nodes)}
        drawn = lay_out([[number[source] for source in node.all_input_nodes if source in number] for node in nodes])
        for (node, node_values), lanes in zip(nodes.items(), drawn, strict=True):
            yield self.row(region, module, node, node_values, lanes)

    def row(self, region: str, module: TracedModule, node: fx.Node, values: list[Value], lanes: Lanes) -> NodeRow:
        """The row of one node."""
        target = str(node.target)
        stack = [str(path) for path, *_ in node.meta.get("nn_module_stack", {}).values()]
        kind = {"placeholder": "input", "get_attr": "tensor"}.get(node.op, getattr(node.target, "__name__", target))
        if node.op == "call_module":
            kind = type(module.get_submodule(target)).__name__
            stack = stack[:-1]  # the last is the layer itself
        path = ".".join(filter(None, (region, target))) if node.op in ("call_module", "get_attr") else ""
        scope = ".".join(filter(None, (region, *stack[-1:])))
        shapes = ", ".join(f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" for value in values)
        labels = {id(label): label for value in values for label in value.labels}.values()
        return NodeRow(
            name=path or node.name,
            kind=kind,
            scope=tuple(scope.split(".")) if scope else (),
            about=f"{describe_place(node)} gives {shapes}" if shapes else describe_place(node),
            gives=list(dict.fromkeys(map(self.parts, labels))),
            axes=list(self.axes(self.inside.get(path, ()))),
            lanes=lanes,
        )

    def outside(self) -> Iterator[str]:
        """Layers that stand in none of the graphs."""
        names = [name for name in self.analysis.shapes if name not in self.shown]
        rows = []
        for path, parameters in itertools.groupby(names, lambda name: name.rpartition(".")[0]):
            kind = type(self.analysis.graph.get_submodule(path)).__name__
            axes = list(self.axes(parameters))
            rows.append(NodeRow(path or "the model", kind, (), "", [parts for _, parts in axes[:1]], axes, None))
        if rows:
            yield write_section(
                "In no graph", "Plain Python calls these layers, or train mode alone, or nothing.", rows
            )

    def axes(self, names: Iterable[str]) -> Iterator[tuple[str, Parts]]:
        """The axes of parameters and buffers, and the channels along them; they count as shown."""
        for name in names:
            self.shown.add(name)
            first = self.analysis.aliases[name]
            same = f" (the same tensor as {first})" if first != name else ""
            for axis in range(len(self.analysis.shapes[name])):
                if (first, axis) in self.analysis.axes:
                    yield f"{name}[{axis}]{same}", self.parts(self.analysis.axes[first, axis].names)

    def parts(self, names: Ints) -> Parts:
        """The groups and reasons in an array of names, in their order."""
        if id(names) not in self.known:
            known, flat = self.analysis.names, names.ravel()
            counts = dict[tuple[str, str], int]()
            for root, reason in zip(known.find(flat).tolist(), known.reason_numbers(flat).tolist(), strict=True):
                owner = self.frozen(known.reasons[reason].text) if reason >= 0 else self.group(self.group_of[root])
                counts[owner] = counts.get(owner, 0) + 1
            self.known[id(names)] = tuple(Part(count, *owner) for owner, count in counts.items())
        return self.known[id(names)]

    def group(self, number: int) -> tuple[str, str]:
        """The id of a group on the page, and what to call it."""
        return f"g{number}", f"group {self.groups[number].name}"

    def frozen(self, reason: str) -> tuple[str, str]:
        """The id of a reason on the page, and what to call it."""
        return f"f{self.reasons.setdefault(reason, len(self.reasons))}", f"frozen: {reason}"

    def group_entries(self) -> Iterator[str]:
        """The groups with their members."""
        for number, group in enumerate(self.groups):
            about = "A normalization runs over them: its statistics change when channels go." if group.inexact else ""
            members = [f"{member.parameter}[{member.axis}]" for member in group.members]
            yield write_entry(f"g{number}", group.name, count_noun(group.size, "channel", "channels"), about, members)

    def frozen_entries(self) -> Iterator[str]:
        """The reasons with the axes that they froze, and where they arose."""
        for text, number in self.reasons.items():
            entries = [frozen for frozen in self.analysis.frozen if frozen.reason.text == text]
            place = {reason: self.analysis.place(reason) for reason in {frozen.reason for frozen in entries}}
            members = [
                f"{axis.parameter}[{axis.axis}]: {len(axis.index)} frozen: {place[axis.reason]}" for axis in entries
            ]
            yield write_entry(f"f{number}", text, count_noun(len(entries), "axis", "axes"), "", members)
