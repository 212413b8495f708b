"""Attention in forms that can be traced and pruned: every size comes from the weights or stands in the graph.

``nn.MultiheadAttention`` insists on ``embed_dim == heads * head_dim`` and torchvision's window attention computes head
sizes from its input. ``trace`` swaps them for these modules, which hold the same parameters under the same names.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.loaded import loaded_types


def adopt(module: nn.Module, source: nn.Module) -> None:
    """Give ``module`` the parameters, buffers, submodules, hooks and mode of ``source``, as the same objects."""
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
        module.__dict__[name] = source.__dict__[name]


class Attention(nn.Module):
    """``nn.MultiheadAttention``, traceable. Same call, same parameters, same result."""

    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    bias_k: Tensor
    bias_v: Tensor
    out_proj: nn.Linear

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        adopt(self, source)
        self.num_heads = source.num_heads
        self.scale = 1 / math.sqrt(source.head_dim)
        self.dropout = source.dropout
        self.batch_first = source.batch_first
        self.packed = source._qkv_same_embed_dim
        self.has_bias_kv = source.bias_k is not None
        self.add_zero_attn = source.add_zero_attn

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention.forward``. query: float[batch, length, embed], or batch second."""
        q, k, v = self.project(query, key, value)
        if not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        mask = self.mask(query, key_padding_mask, attn_mask)
        if self.has_bias_kv:
            k = torch.cat([k, self.bias_k + torch.zeros_like(k[:, :1])], 1)
            v = torch.cat([v, self.bias_v + torch.zeros_like(v[:, :1])], 1)
        if self.add_zero_attn:
            k = torch.cat([k, torch.zeros_like(k[:, :1])], 1)
            v = torch.cat([v, torch.zeros_like(v[:, :1])], 1)
        if mask is not None:
            mask = F.pad(mask, (0, self.has_bias_kv + self.add_zero_attn))
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v))  # type: ignore[no-untyped-call]
        rate = self.dropout if self.dropout and self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = (F.dropout(weights, rate) if rate else weights) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, rate, scale=self.scale)
        mixed = mixed.transpose(1, 2).flatten(-2)
        mixed = mixed if self.batch_first else mixed.transpose(0, 1)
        return self.out_proj(mixed), weights

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v: float[..., heads * head_dim]."""
        if not self.packed:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        elif query is key is value:
            parts = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return parts[0], parts[1], parts[2]  # unpacked while it is traced, it would be slow
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, weights[i], biases[i]) for i, x in enumerate((query, key, value)))

    @staticmethod
    def mask(query: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """One additive mask that broadcasts to float[batch, heads, length, source]."""
        masks = []
        if mask is not None:
            masks.append(additive(mask, query))
        if padding is not None:
            masks.append(additive(padding, query)[:, None, None, :])
        return sum(masks[1:], masks[0]) if masks else None


@torch.fx.wrap
def additive(mask: Tensor, query: Tensor) -> Tensor:
    """A boolean mask (True = hidden) as an additive one, of the dtype of ``query``."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))
    return mask


class WindowAttention(nn.Module):
    """torchvision's shifted window attention of Swin and Swin v2: x is float[batch, height, width, channels]."""

    qkv: nn.Linear
    proj: nn.Linear
    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def __init__(self, source: Any) -> None:
        super().__init__()
        adopt(self, source)
        self.window, self.shift = list(source.window_size), list(source.shift_size)
        self.attention_dropout, self.dropout = source.attention_dropout, source.dropout
        self.scale = 1 / math.sqrt(source.qkv.weight.shape[0] // 3 // source.num_heads)
        self.source = [source]  # in a list, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        """Same call and result as torchvision's module."""
        return self.attend(x, self.source[0].get_relative_position_bias(), self.window, self.shift)

    def attend(self, x: Tensor, bias: Tensor, window: list[int], shift: list[int]) -> Tensor:
        """Windows of size ``window``, moved by ``shift``. bias: float[1, heads, length, length]."""
        return window_attention(
            x,
            self.qkv.weight,
            self.qkv.bias,
            self.proj.weight,
            self.proj.bias,
            bias,
            getattr(self, "logit_scale", None),
            self.scale,
            window,
            shift,
            self.attention_dropout if self.attention_dropout and self.training else 0.0,
            self.dropout if self.dropout and self.training else 0.0,
        )


class WindowAttention3d(WindowAttention):
    """torchvision's Swin3d window attention: x is float[batch, time, height, width, channels]."""

    def forward(self, x: Tensor) -> Tensor:
        """Same call and result as torchvision's module."""
        window = fit_window(x, self.window, self.window)
        shift = fit_window(x, self.window, self.shift)
        bias = position_bias(self.relative_position_bias_table, self.relative_position_index, window)
        return self.attend(x, bias, window, shift)


@torch.fx.wrap
def fit_window(x: Tensor, window: list[int], sizes: list[int]) -> list[int]:
    """``sizes`` (of windows or shifts), with an axis that fits into one window made one window without a shift."""
    whole = x.shape[1:-1] if sizes == window else [0] * len(window)
    return [
        size if inside > across else instead
        for size, inside, across, instead in zip(sizes, x.shape[1:-1], window, whole, strict=True)
    ]


@torch.fx.wrap
def position_bias(table: Tensor, index: Tensor, window: list[int]) -> Tensor:
    """float[1, heads, length, length] from the table of relative positions float[rows, heads]."""
    length = math.prod(window)
    rows = index[:length, :length].flatten()
    return table[rows].view(length, length, -1).permute(2, 0, 1).unsqueeze(0)


@torch.fx.wrap
def window_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    bias: Tensor,
    logit_scale: Tensor | None,
    scale: float,
    window: list[int],
    shift: list[int],
    attention_dropout: float,
    dropout: float,
) -> Tensor:
    """Attention within (shifted) windows of any number of axes. The number of heads is that of ``bias``.

    x: float[batch, *space, channels]; returns the same shape with the channels of ``proj_weight``.
    """
    batch, *space, _ = x.shape
    axes = list(range(1, len(space) + 1))
    heads = bias.shape[1]
    padded = [math.ceil(size / step) * step for size, step in zip(space, window, strict=True)]
    padding = [amount for i in reversed(range(len(space))) for amount in (0, padded[i] - space[i])]
    shift = [0 if step >= size else by for by, step, size in zip(shift, window, padded, strict=True)]
    x = F.pad(x, (0, 0, *padding))
    if any(shift):
        x = torch.roll(x, [-by for by in shift], axes)
    x = to_windows(x, window, padded)

    if logit_scale is not None and qkv_bias is not None:  # Swin v2: keys have no bias
        q, k, v = qkv_bias.chunk(3)
        qkv_bias = torch.cat([q, torch.zeros_like(k), v])
    qkv = F.linear(x, qkv_weight, qkv_bias)
    q, k, v = qkv.reshape(x.shape[0], x.shape[1], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if logit_scale is None:
        scores = (q * scale) @ k.transpose(-2, -1)
    else:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    scores = scores + bias
    if any(shift):
        mask = window_mask(x, window, shift, padded)
        scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)  # type: ignore[no-untyped-call]
    scores = F.dropout(F.softmax(scores, dim=-1), attention_dropout, attention_dropout > 0)
    x = (scores @ v).transpose(1, 2).flatten(2)
    x = F.dropout(F.linear(x, proj_weight, proj_bias), dropout, dropout > 0)

    counts = [size // step for size, step in zip(padded, window, strict=True)]
    x = x.reshape(batch, *counts, *window, x.shape[-1])
    n = len(space)
    x = x.permute(0, *(axis for i in range(n) for axis in (1 + i, 1 + n + i)), 2 * n + 1)
    x = x.reshape(batch, *padded, x.shape[-1])
    if any(shift):
        x = torch.roll(x, shift, axes)
    for axis, size in zip(axes, space, strict=True):
        x = x.narrow(axis, 0, size)
    return x.contiguous()


def to_windows(x: Tensor, window: list[int], padded: list[int]) -> Tensor:
    """float[batch, *space, channels] -> float[batch * windows, length, channels]."""
    n = len(window)
    cut = [part for size, step in zip(padded, window, strict=True) for part in (size // step, step)]
    x = x.reshape(x.shape[0], *cut, x.shape[-1])
    x = x.permute(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return x.reshape(-1, math.prod(window), x.shape[-1])


def window_mask(x: Tensor, window: list[int], shift: list[int], padded: list[int]) -> Tensor:
    """float[windows, length, length]: -100 between positions that the cyclic shift brought together."""
    region = x.new_zeros((1, *padded, 1))
    for axis, (step, by, size) in enumerate(zip(window, shift, padded, strict=True)):
        line = torch.arange(size, device=x.device)
        part = (line >= size - step).to(x.dtype) + (line >= size - by).to(x.dtype) if by else line.to(x.dtype) * 0
        region = region * 3 + part.view([-1 if i == axis + 1 else 1 for i in range(len(padded) + 2)])
    region = to_windows(region, window, padded).squeeze(-1)
    return (region.unsqueeze(1) != region.unsqueeze(2)).to(x.dtype) * -100.0


REPLACEMENTS: dict[str, Callable[[Any], nn.Module]] = {
    "torch.nn.MultiheadAttention": Attention,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": WindowAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": WindowAttention,
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": WindowAttention3d,
}
"""Modules that ``trace`` replaces before tracing: class -> what makes the replacement from it. Extend freely."""


def find_replacement(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    """What makes the replacement of ``module``, if it has one."""
    return next((make for name, make in REPLACEMENTS.items() if type(module) in loaded_types(name)), None)
