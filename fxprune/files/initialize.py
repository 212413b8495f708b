"""Initialize: give a model start values that can be made again from a seed, one by one, on any device."""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxprune.errors import InitializeError, require_type
from fxprune.files.start import Origin, Start, remember_start
from fxprune.graph.layers import CONTRACTIONS
from fxprune.graph.trace import unwrap_model

FANS = ("fan_in", "fan_out")
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
StartRule = str | tuple[str, float]


def initialize(model: nn.Module, seed: int, rules: Mapping[str, StartRule] | None = None) -> nn.Module:
    """Overwrite the parameters of ``model`` with start values that are a pure function of (seed, name, index).

    They are bitwise the same for every device, thread count and subset. ``passes.DropBack`` needs them, and
    ``fxprune.save`` writes only what differs from them. Buffers stay.

    Without a rule of yours, parameters whose values are all equal keep them (biases, norms, layer scales); other norms
    start at 1 and 0; weights of convolutions and linear layers have He et al.'s rule ("kaiming_normal"), their biases
    torch's own (uniform within 1 / sqrt(fan_in)); embeddings a standard deviation of 1, anything else of 0.02.

    Args:
        model: changed in place; its wrappers, if any, do not count for the names.
        seed: any integer.
        rules: patterns of parameter names, and what they get; the first that matches counts. Of torch.nn.init there are
            "kaiming_normal" and "kaiming_uniform", with gain sqrt(2) and by the fan in, or by the other one
            ("kaiming_normal fan_out"), and "xavier_normal" and "xavier_uniform"; else ("uniform", bound), ("normal",
            deviation) or ("constant", value). A normal is a sum of four uniforms, at most 3.47 deviations wide.

    Returns:
        ``model`` itself.

    Raises:
        InitializeError: a rule is not known or matches nothing, or a parameter has no floating-point values.
    """
    require_type(model, nn.Module, "model", InitializeError)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InitializeError(f"seed={seed!r} must be an integer")
    core, rules = unwrap_model(model), dict(rules or {})
    parameters = dict(core.named_parameters())
    for pattern in rules:
        if not fnmatch.filter(parameters, pattern):
            raise InitializeError(
                f"the rule for {pattern!r} matches none of the parameters, such as {[*parameters][:5]}"
            )
    for name, parameter in parameters.items():
        if parameter.is_meta or not parameter.is_floating_point():
            raise InitializeError(
                f"{name} is {parameter.dtype} on {parameter.device}: only floating-point values on a device that has "
                "values can be initialised"
            )
    start = Start(seed, {name: origin_of(core, name, parameter, rules) for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start.values(name, parameter.device))
    remember_start(core, start)
    return model


def origin_of(model: nn.Module, name: str, parameter: Tensor, rules: Mapping[str, StartRule]) -> Origin:
    """How one parameter starts."""
    shape = tuple(parameter.shape)
    rule = next((rule for pattern, rule in rules.items() if fnmatch.fnmatchcase(name, pattern)), None)
    if rule is None:
        return default_origin(model, name, parameter)
    if isinstance(rule, str):
        return by_fans(rule, name, shape)
    try:
        kind, scale = rule
        return Origin(kind, float(scale), shape)
    except (TypeError, ValueError) as error:
        raise InitializeError(f"{name} can't start as {rule!r}: {error}") from error


def default_origin(model: nn.Module, name: str, parameter: Tensor) -> Origin:
    """How a parameter without a rule starts, by its layer and by the values that it has."""
    path, _, role = name.rpartition(".")
    layer, shape = model.get_submodule(path), tuple(parameter.shape)
    alone = parameter.numel() == 1 and isinstance(layer, CONTRACTIONS)  # its value may be random
    if parameter.numel() and not alone and bool((parameter == parameter.flatten()[0]).all()):
        return Origin("constant", parameter.flatten()[0].item(), shape)
    if isinstance(layer, NORMS):
        return Origin("constant", 1.0 if role == "weight" else 0.0, shape)
    if isinstance(layer, CONTRACTIONS) and role == "weight":
        return by_fans("kaiming_normal", name, shape)
    if isinstance(layer, CONTRACTIONS) and isinstance(layer.weight, Tensor):
        return Origin("uniform", 1 / math.sqrt(count_fans(tuple(layer.weight.shape))[0]), shape)
    if role == "in_proj_weight":
        return by_fans("xavier_uniform", name, shape)
    return Origin("normal", 1.0 if isinstance(layer, nn.Embedding) else 0.02, shape)


def by_fans(rule: str, name: str, shape: tuple[int, ...]) -> Origin:
    """A rule of torch.nn.init."""
    method, _, fan = rule.partition(" ")
    scheme, _, kind = method.partition("_")
    known = scheme in ("kaiming", "xavier") and kind in ("uniform", "normal")
    if not known or (fan and (scheme == "xavier" or fan not in FANS)):
        raise InitializeError(
            f"{name} can't start as {rule!r}: use 'kaiming_normal', 'kaiming_uniform' (both also with ' fan_out'), "
            "'xavier_normal', 'xavier_uniform', or a kind with its number, such as ('uniform', 0.1)"
        )
    if len(shape) < 2:
        raise InitializeError(f"{name} can't start as {rule!r}: it has the shape {shape}, and only weights have fans")
    fan_in, fan_out = count_fans(shape)
    variance = 2 / (fan_in + fan_out) if scheme == "xavier" else 2 / (fan_out if fan == "fan_out" else fan_in)
    made = Origin("normal", math.sqrt(variance), shape)
    return made if kind == "normal" else replace(made, kind="uniform", scale=math.sqrt(3 * variance))


def count_fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """The fan in and the fan out of a weight, as torch.nn.init counts them."""
    area = math.prod(shape[2:])
    return max(shape[1] * area, 1), max(shape[0] * area, 1)
