"""Every line of cases.py, and the shapes that are found without torch."""

from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, SIZES, Case

import fxprune  # noqa: F401  (registers the rules)
from fxprune.channels.labels import label_along, on_axis, pin_axes, varying_axes
from fxprune.channels.tensor import ChannelTensor, NameRun, as_operand, freeze_unknown, name_of, rule
from fxprune.graph.shapes import shape_of_result


def describe(case: Case) -> str:
    """What the operator of ``case`` does with the names of its operands, as text."""
    run = NameRun(heads=case.heads, groups=case.groups)
    axes: dict[str, np.ndarray] = {}
    tensors = []
    for operand in case.operands.split():
        labels = []
        for at, letter in enumerate(operand):
            if letter == ".":
                continue
            key = letter if letter not in axes else next(x for x in ascii_lowercase.upper() if x not in axes)
            axes[key] = run.names.fresh(SIZES[letter])
            labels.append(on_axis(axes[key], at, len(operand)))
        data = torch.empty([SIZES.get(letter, 7) for letter in operand], device="meta")
        tensors.append(ChannelTensor(data, tuple(labels), run))
    with torch.no_grad():
        result = case.run(*tensors)
    owner = {int(name): letter for letter, names in axes.items() for name in names}

    def written(names: list[int]) -> str:
        parts: list[list] = []
        for name in dict.fromkeys(names):
            letter = owner.get(name, "new")
            if parts and parts[-1][0] == letter:
                parts[-1][1] += 1
            else:
                parts.append([letter, 1])
        lengths = {letter: len(channels) for letter, channels in axes.items()}
        if len(parts) > 4:
            return "mixed " + "*".join(dict.fromkeys(letter for letter, _ in parts))
        return "+".join(
            f"{letter}" if count == lengths.get(letter, count) else f"{letter}:{count}" for letter, count in parts
        )

    shown = []
    for axis in range(result.ndim):
        label = label_along(result.labels, axis)
        if label is None:
            shown.append("-")
        elif len(varying_axes(label)) > 1:
            shown.append("(" + written(sorted(label.flatten().tolist())) + ")")
        else:
            shown.append(written(label.flatten().tolist()))
    roots = {letter: run.names.find(names) for letter, names in axes.items()}
    merged = []
    seen: set[str] = set()
    for letter, channels in roots.items():
        same = [twin for twin, labels in roots.items() if twin not in seen and np.array_equal(labels, channels)]
        if len(same) > 1 and letter not in seen:
            merged.append("=".join(same))
            seen.update(same)
        classes = len(np.unique(channels))
        if classes < len(channels):
            merged.append(f"{letter}!" if classes == 1 else f"{letter}/{classes}")
    for i, (a, first_names) in enumerate(roots.items()):
        for b, second_names in list(roots.items())[i + 1 :]:
            if np.intersect1d(first_names, second_names).size and not np.array_equal(first_names, second_names):
                merged.append(f"{a}~{b}")
    frozen = [letter for letter, names in axes.items() if run.names.frozen(names).all()]
    frozen += [
        f"some of {letter}" for letter, names in axes.items() if letter not in frozen and run.names.frozen(names).any()
    ]
    grids = f" | grids {len(run.grids)}" if run.grids else ""
    return f"{' '.join(shown)} | {' '.join(sorted(merged))} | {' '.join(sorted(frozen))}{grids}".replace(
        "|  |", "| |"
    ).strip()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator(case: Case) -> None:
    assert describe(case) == case.expected


aten = torch.ops.aten
PLAIN = [
    (aten.relu.default, "nchw"),
    (aten.add.Tensor, "nchw nchw"),
    (aten.mul.Tensor, "nchw nc11"),
    (aten.mul.Tensor, "n1hw 1c11"),
    (aten.sub.Tensor, "nchw", 2.5),
    (aten.mean.dim, "nchw", [2, 3], True),
    (aten.mean.dim, "nchw", [-1, 1]),
    (aten.linear.default, "c oc o"),
    (aten.linear.default, "nhwc oc"),
    (aten.layer_norm.default, "nhwc", [7, 4], "wc", "wc", 1e-5, False),
    (aten.batch_norm.default, "nchw", "c", None, "c", "c", True, 0.1, 1e-5, False),
    (aten.convolution.default, "nchw ockl o", [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    (aten.convolution.default, "nchw ockl", None, [2, 3], [1, 2], [2, 1], False, [0, 0], 1),
    (aten.convolution.default, "nzhw z2kl z", [2], [1], [1], False, [0], 8),
    (aten.convolution.default, "nch ock", None, [3], [1], [2], False, [0], 1),
]
ODD = [
    (aten.mul.Tensor, "nchw nchk"),
    (aten.linear.default, "nchw oc"),
    (aten.layer_norm.default, "nhwc", [7, 4], "c", None, 1e-5, False),
    (aten.batch_norm.default, "nchw", "o", None, "c", "c", True, 0.1, 1e-5, False),
    (aten.convolution.default, "nohw ockl", None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    (aten.convolution.default, "nckl ochw", None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
]


def on_meta(call: tuple[Any, ...]) -> tuple[Any, list[Any]]:
    """An operator and its arguments, tensors given by the letters of their axes."""
    func, *args = call
    words = [arg.split() if isinstance(arg, str) else [arg] for arg in args]
    sizes = SIZES | {"1": 1, "2": 2}
    return func, [
        torch.empty([sizes[letter] for letter in arg], device="meta") if isinstance(arg, str) else arg
        for part in words
        for arg in part
    ]


@pytest.mark.parametrize("call", PLAIN, ids=str)
def test_a_plain_shape_is_that_of_torch(call: tuple[Any, ...]) -> None:
    func, args = on_meta(call)
    out = func(*args)
    assert shape_of_result(name_of(func), args) == out.shape
    assert out.is_contiguous()
    assert out.dtype == torch.float32


@pytest.mark.parametrize("call", ODD, ids=str)
def test_torch_refuses_what_has_no_shape(call: tuple[Any, ...]) -> None:
    func, args = on_meta(call)
    assert shape_of_result(name_of(func), args) is None
    with pytest.raises(RuntimeError):
        func(*args)


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize(("says", "frozen"), [({}, "c"), ({"keeps_zero": True}, "")])
def test_a_rule_that_is_silent_gives_what_is_not_zero(says: dict[str, bool], frozen: str) -> None:
    rule("roll", **says)(lambda call: as_operand(call.args[0]).labels)
    case = Case("", lambda x: x.roll(1, 0).sum(1), "mc", "")
    assert describe(case) == f"m | | {frozen}".strip()


@pytest.mark.usefixtures("own_tables")
def test_a_later_rule_takes_the_place_of_an_earlier_one() -> None:
    case = Case("", lambda x: torch.linalg.inv(x), "cd", "")
    assert describe(case) == "- - | | c d"
    rule("linalg_inv_ex", keeps_zero=True)(lambda call: [as_operand(call.args[0]).labels, ()])
    assert describe(case) == "c d | |"
    rule("linalg_inv_ex")(freeze_unknown)
    assert describe(case) == "- - | | c d"


def test_an_index_is_not_zero_where_it_points_to_zeros() -> None:
    pooled = Case("", lambda x: F.max_pool2d(x, 7, return_indices=True)[0].sum(1), "nc..", "")
    places = Case("", lambda x: F.max_pool2d(x, 7, return_indices=True)[1].sum(1), "nc..", "")
    assert describe(pooled) == "n - - | |"
    assert describe(places) == "n - - | | c"


def test_where_to_sample_is_frozen() -> None:
    case = Case("", lambda x, grid: F.grid_sample(x, grid, align_corners=False), "nchw ntsg", "")
    assert describe(case) == "n c - - | | A g h s t w"


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("axis", [1, -2])
def test_a_rule_may_count_axes_from_the_end(axis: int) -> None:
    rule("roll")(
        lambda call: tuple(pin_axes(call.names, label, [axis], "") for label in as_operand(call.args[0]).labels)
    )
    assert describe(Case("", lambda x: x.roll(1, 0), "nch", "")) == "n - h | | c"
