"""Follow: a graph beside one of the same model for other inputs. What differs is followed: nodes give it."""

from typing import Any

from torch import fx

MADE = "made"  # in the meta of a node that was not recorded: it gives what is followed


class DiffersError(Exception):
    """Two graphs differ in what can't be followed."""

    def __init__(self, node: fx.Node, twin: fx.Node) -> None:
        super().__init__(node.name)
        self.node, self.twin = node, twin


class Follower:
    """Finds, for values that differ between a graph and another, the nodes that give them.

    Attributes:
        graph: is changed, by ``follow_graph``.
        made: the nodes that were made for it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: list[fx.Node] = []
        self.changes: list[tuple[fx.Node, Any, Any]] = []

    def follow_graph(self, other: fx.Graph) -> None:
        """Put nodes for what differs.

        Raises:
            DiffersError: something differs that can't be followed; then the graph is as it was.
        """
        nodes, others = [node for node in self.graph.nodes if MADE not in node.meta], list(other.nodes)
        try:
            for node, twin in zip(nodes, others, strict=False):
                if (node.op, node.target, node.name) != (twin.op, twin.target, twin.name):
                    raise DiffersError(node, twin)
                if repr(node.args) != repr(twin.args) or repr(node.kwargs) != repr(twin.kwargs):
                    self.follow_node(node, twin)
            if len(nodes) != len(others):
                last = min(len(nodes), len(others)) - 1
                raise DiffersError(nodes[last], others[last])
        except DiffersError:
            for node in reversed(self.made):
                self.graph.erase_node(node)
            raise
        for node, args, kwargs in self.changes:
            node.args, node.kwargs = args, kwargs

    def follow_node(self, node: fx.Node, twin: fx.Node) -> None:
        """Find what the arguments of ``node`` follow, which differ from those of ``twin``."""
        args, kwargs = (self.follow(node, twin, *pair) for pair in ((node.args, twin.args), (node.kwargs, twin.kwargs)))
        self.changes.append((node, args, kwargs))

    def follow(self, node: fx.Node, twin: fx.Node, a: Any, b: Any) -> Any:
        """An argument of ``node``, ``b`` of ``twin``, with nodes for what differs."""
        if isinstance(a, slice) and isinstance(b, slice):
            bounds = ((a.start, b.start), (a.stop, b.stop), (a.step, b.step))
            return slice(*(self.follow(node, twin, *pair) for pair in bounds))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self.follow(node, twin, a[key], b[key]) for key in a}
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
            items = [self.follow(node, twin, *pair) for pair in zip(a, b, strict=True)]
            return tuple(items) if isinstance(a, tuple) else items
        if repr(a) == repr(b) or (isinstance(a, fx.Node) and MADE in a.meta):
            return a
        source = self.find(node, twin, a, b)
        if source is None:
            raise DiffersError(node, twin)
        return source

    def find(self, node: fx.Node, twin: fx.Node, a: Any, b: Any) -> fx.Node | None:
        """The node that gives ``a`` here, and would give ``b`` there; None where there is none."""
        raise NotImplementedError

    def make(self, behind: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A node right behind another: a call of a function, or, by its name, of a method."""
        with self.graph.inserting_after(behind):
            made = self.graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args)
        made.meta[MADE] = True
        self.made.append(made)
        return made


def behind_inputs(node: fx.Node) -> fx.Node:
    """``node``; for an argument of the model, the last one."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node
