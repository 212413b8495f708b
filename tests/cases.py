"""What operators do with channel names, one line a case.

Each operand is given by the letters of its axes. Every letter is an axis with names of its own, of the size in SIZES; a
second axis of the same letter is called by a capital (the first free one: A, B, ...); "." is an axis of size 7 without
names. Sizes of 1 can't be written.

The expectation reads: axes of the result | names that merged | axes that are frozen. The letters of a result are those
of the operand whose labels the rule hands on first. In the result, "-" is an axis without names, "c+d" one after the
other, "c:3" only 3 of the names, "(o)" an axis that shares its names with others. A merged axis "c!" is one class,
"c/2" is merged into 2; "c~d" have names in common. "grids" counts the views of which pruning must leave a rectangle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

SIZES = dict(n=2, m=5, c=4, d=4, e=6, f=6, o=8, p=8, g=2, h=7, w=7, k=3, l=3, i=4, j=4, t=5, s=5, q=12, r=12, z=16)


@dataclass(frozen=True)
class Case:
    """An operator, the axes of its operands, and what is expected."""

    name: str
    run: Callable[..., Any]
    operands: str
    expected: str
    groups: str = "auto"
    heads: str = "whole"


def index_rows(x):
    return x[:, torch.tensor([2, 0, 1])]


CASES = [
    Case("relu", F.relu, "nchw", "n c h w | |"),
    Case("hardswish", F.hardswish, "nchw", "n c h w | |"),
    Case("add in place", lambda x, y: x.add_(y), "mc td", "m c | c=d m=t |"),
    Case("add", torch.add, "mc td", "m c | c=d m=t |"),
    Case("add broadcasts", torch.add, "mc d", "m c | c=d |"),
    Case("mul by a gate", lambda x, y: x * y[:, :, None, None], "mchw td", "m c h w | c=d m=t |"),
    Case("add a constant", lambda x: x + torch.ones(4), "mc", "m - | | c"),
    Case("add a number", lambda x: x + 1, "mc", "m c | |"),
    Case("where", lambda x, y: torch.where(x > 0, x, y), "mc td", "m c | c=d m=t |"),
    Case("prelu", F.prelu, "ncw d", "n c w | c=d |"),
    Case("glu", lambda x: F.glu(x, 1), "no", "n o:4 | o/4 |"),
    Case("dropout in training", lambda x: F.dropout(x, 0.5, True), "mc", "m c | |"),
    Case("zeros_like", lambda x: x + torch.zeros_like(x), "mc", "m c | |"),
    Case("new_zeros", lambda x: x + x.new_zeros(5, 4), "mc", "- - | | c m"),
    Case("linear", F.linear, "mc od", "m o | c=d |"),
    Case("linear with bias", F.linear, "mc od p", "m o | c=d o=p |"),
    Case("linear by keyword", lambda x, w, b: F.linear(x, weight=w, bias=b), "mc od p", "m o | c=d o=p |"),
    Case("linear all by keyword", lambda x, w: F.linear(weight=w, input=x), "mc od", "m o | c=d |"),
    Case("linear on tokens", F.linear, "..c od", "- - o | c=d |"),
    Case("linear on a constant", lambda w: F.linear(torch.ones(2, 4), w), "oc", "- o | | c"),
    Case("matmul of two values", torch.matmul, "mc dt", "m t | c=d |"),
    Case("matmul where nothing is zero", lambda x, y: x.sigmoid() @ y.sigmoid(), "mc dt", "m t | c=d | c d"),
    Case("matmul where one is zero", lambda x, y: x.sigmoid() @ y.relu(), "mc dt", "m t | c=d |"),
    Case("bmm", torch.bmm, "nmc ndt", "n m t | c=d n=A |"),
    Case("einsum", lambda x, w: torch.einsum("nct,oc->not", x, w), ".c. od", "- o - | c=d |"),
    Case("conv1d", F.conv1d, "nch odk", "n o - | c=d | h k"),
    Case("conv2d", F.conv2d, "nchw odkl", "n o - - | c=d | h k l w"),
    Case("conv2d with bias", F.conv2d, "nchw odkl p", "n o - - | c=d o=p | h k l w"),
    Case("conv3d", F.conv3d, "nchwt odklg", "n o - - - | c=d | g h k l t w"),
    Case("conv2d on a constant", lambda w: F.conv2d(torch.ones(2, 4, 7, 7), w), "ockl", "- o - - | | c k l"),
    Case("depthwise", lambda x, w: F.conv2d(x, w[:, None], groups=4), "nchw dkl", "n c - - | c=d | h k l w"),
    Case(
        "depthwise, twice the channels",
        lambda x, w: F.conv2d(x, w[:, None], groups=4),
        "nchw okl",
        "n c - - | c~o o/4 | h k l w",
    ),
    Case(
        "grouped, whole",
        lambda x, w: F.conv2d(x, w, groups=4),
        ".z.. pikl",
        "- z:4 - - | p/4 z/4 z~p | i k l",
        groups="whole",
    ),
    Case(
        "grouped, within",
        lambda x, w: F.conv2d(x, w, groups=4),
        ".z.. pikl",
        "- p:2 - - | p/2 z/4 z~i | k l",
        groups="within",
    ),
    Case("transposed", F.conv_transpose2d, "nchw dokl", "n o - - | c=d | h k l w"),
    Case(
        "transposed, grouped, whole",
        lambda x, w: F.conv_transpose2d(x, w, groups=2),
        ".c.. dokl",
        "- c:2 - - | c/2 c=d d/2 | k l o",
        groups="whole",
    ),
    Case(
        "transposed, grouped, within",
        lambda x, w: F.conv_transpose2d(x, w, groups=2),
        ".c.. dokl",
        "- o - - | c/2 c=d d/2 | k l",
        groups="within",
    ),
    Case("attention", F.scaled_dot_product_attention, ".g.c .g.c .g.e", "- g - e | c=B g=A=C |"),
    Case("view splits", lambda x: x.view(5, 2, 4), "mo", "m (o) (o) | |  | grids 1"),
    Case("view merges", lambda x: x.reshape(5, 16), "mdi", "m d | d! d=i i! |"),
    Case("view merges a frozen axis", lambda x: (x + torch.ones(4)).reshape(7, 16), ".ic", "- i | | c"),
    Case("flatten after pooling", lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1), "mchw", "m c | | h w"),
    Case("permute", lambda x: x.permute(0, 2, 3, 1), "nchw", "n h w c | |"),
    Case("transpose", lambda x: x.transpose(0, 1), "mc", "c m | |"),
    Case("t", torch.t, "mc", "c m | |"),
    Case("unsqueeze and expand", lambda x: x[:, None].expand(-1, 3, -1), "mc", "m - c | |"),
    Case("slice", lambda x: x[:, 1:3], "mc", "m c:2 | |"),
    Case("slice with a step", lambda x: x[:, ::2], "mc", "m - | | c"),
    Case("select", lambda x: x[:, 1], "mc", "m | | c"),
    Case("chunk and cat", lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "mo", "m o | |"),
    Case("cat", lambda x, y: torch.cat([x, y], 1), "mc te", "m c+e | m=t |"),
    Case("cat tokens", lambda x, y: torch.cat([x, y], 0), "mc ed", "m+e c | c=d |"),
    Case("cat with a constant", lambda x: torch.cat([x, torch.ones(5, 3)], 1), "mc", "- c+new | | m"),
    Case("stack", lambda x, y: torch.stack([x, y], 1), "mc td", "m - c | c=d m=t |"),
    Case("pad channels", lambda x: F.pad(x, (1, 2)), "mc", "m new+c+new | |"),
    Case("pad space", lambda x: F.pad(x, (1, 1)), "nc", "n new+c+new | |"),
    Case("roll", lambda x: x.roll(1, 1), "mc", "m - | | c"),
    Case("flip", lambda x: x.flip(1), "mc", "m c | |"),
    Case("repeat", lambda x: x.repeat(1, 3), "mc", "m c | |"),
    Case("repeat_interleave", lambda x: x.repeat_interleave(2, 1), "mc", "m c | |"),
    Case("index", index_rows, "mc", "m - | | c"),
    Case("embedding", lambda w: F.embedding(torch.tensor([[1, 2]]), w), "tc", "- - c | | t"),
    Case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), "nohw", "n o:2 - - | o/2 | h w"),
    Case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 3), "ncff", "n c - - | | A f"),
    Case("channel_shuffle", lambda x: F.channel_shuffle(x, 2), "nohw", "n o h w | |  | grids 1"),
    Case(
        "batch_norm", lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, False), ".c.. d i j c", "- c - - | c=d=i=j=A |"
    ),
    Case(
        "batch_norm in training",
        lambda x, m, v: F.batch_norm(x, m, v, None, None, True),
        "nchw d i",
        "- c - - | c=d=i | h n w",
    ),
    Case("batch_norm of a weight", lambda x: F.batch_norm(x, None, None, training=True), ".ch", "- c h | |"),
    Case(
        "batch_norm by keyword",
        lambda x, m, v, b: F.batch_norm(input=x, running_var=v, running_mean=m, bias=b),
        ".c.. d i j",
        "- c - - | c=d=i=j |",
    ),
    Case("batch_norm over the batch", lambda x, m, v: F.batch_norm(x, m, v), "mc d i", "- c | c=d=i | m"),
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, (4,), w, b), "mc d i", "m c | c=d=i |"),
    Case("group_norm, two groups", lambda x, w: F.group_norm(x, 2, w), "nch d", "n c - | c/2 c=d d/2 | h"),
    Case("group_norm, one group", lambda x, w: F.group_norm(x, 1, w), "nch d", "n c - | c=d | h"),
    Case("layer_norm by keyword", lambda x, b: F.layer_norm(x, bias=b, normalized_shape=(4,)), "mc d", "m c | c=d |"),
    Case("rms_norm", lambda x, w: F.rms_norm(x, (4,), w), "mc d", "m c | c=d |"),
    Case("mean over space", lambda x: x.mean((2, 3)), "nchw", "n c | | h w"),
    Case("mean over channels", lambda x: x.mean(1), "nchw", "n h w | | c"),
    Case("sum over channels", lambda x: x.sum(1), "nchw", "n h w | |"),
    Case("sum over channels that are not zero", lambda x: (x + 1).sum(1), "nchw", "n h w | | c"),
    Case("normalize", lambda x: F.normalize(x, dim=1), "nchw", "n c h w | |"),
    Case("normalize what is not zero", lambda x: F.normalize(x.cos(), dim=1), "nchw", "n c h w | | c"),
    Case("softmax over channels", lambda x: x.softmax(1), "mc", "m - | | c"),
    Case("max_pool2d", lambda x: F.max_pool2d(x, 2), "nchw", "n c - - | | h w"),
    Case("interpolate", lambda x: F.interpolate(x, scale_factor=2), "nchw", "n c - - | | h w"),
    Case("sort", lambda x: x.sort(1)[0], "mc", "m - | | c"),
    Case("unknown operator", lambda x: torch.linalg.inv(x), "cd", "- - | | c d"),
]
