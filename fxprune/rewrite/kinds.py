"""Kinds: what the nodes of a graph do, as far as rewrites of it must know. ``ops/`` fills the tables."""

from torch import fx, nn

# By class of layer, function, or name of a method. A "pool" keeps channels apart; a "move" may name sizes or positions
# in its call, a "free move" is right at any width.
KINDS: dict[object, str] = {}
GIVES_ZEROS: set[object] = set()  # activations that give exact zeros


def mark_kind(kind: str, *targets: object) -> None:
    """Say that layers of these classes, these functions and methods of these names are of one kind.

    Args:
        kind: "contraction", "norm", "pointwise", "pool", "move" or "free move".
        targets: classes themselves, not what derives from them.
    """
    KINDS.update(dict.fromkeys(targets, kind))


def kind_of(model: nn.Module, node: fx.Node) -> str:
    """The kind of what a node calls; its op where it is no call; "" where nothing is known of it."""
    if node.op in ("call_function", "call_method"):
        return KINDS.get(node.target, "")
    if node.op != "call_module":
        return node.op
    layer = model.get_submodule(str(node.target))
    plain = len(node.args) == 1 and not node.kwargs and not getattr(layer, "return_indices", False)
    plain = plain and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    kind = KINDS.get(type(layer), "")
    return kind if plain and (kind != "contraction" or "weight" in layer._parameters) else ""


def gives_zeros(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node is an activation that gives exact zeros."""
    if node.op == "call_module":
        return not GIVES_ZEROS.isdisjoint(type(model.get_submodule(str(node.target))).__mro__)
    return node.op in ("call_function", "call_method") and node.target in GIVES_ZEROS
