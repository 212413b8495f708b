"""Start values: pure functions of (seed, name, index), spread as torch.nn.init spreads them, and kept through cuts."""

import copy
import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from laws import thinner
from models import MODELS, prepare
from torch import Tensor, nn

import fxprune
from fxprune.errors import InitializeError
from fxprune.files import start
from fxprune.files.initialize import by_fans
from fxprune.files.start import Origin, Start, start_of

KINDS = {"uniform": Origin("uniform", 0.3, (40, 30, 3, 3)), "normal": Origin("normal", 0.3, (40, 30, 3, 3))}


def one(kind: str, seed: int = 5) -> Start:
    return Start(seed, {"w": KINDS[kind]})


def convnet() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))


# ------------------------------------------------------------------------------------------- a pure function


def reference(seed: int, name: str, kind: str, scale: float, count: int) -> np.ndarray:
    """The values by the definition, one by one, in Python's own integers."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
    values = []
    for index in range(count):
        z = (key + index * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        if kind == "uniform":
            values.append(np.float32(2 * (z >> 40) + 1 - 2**24) * np.float32(scale / 2**24))
        else:
            total = sum((z >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
            values.append(np.float32(total - 131070) * np.float32(scale * math.sqrt(3 / (2.0**32 - 1))))
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 7, -3, 2**80])
def test_values_are_those_of_the_definition(kind: str, seed: int) -> None:
    values = one(kind, seed).values("w").flatten()[:200].numpy()
    np.testing.assert_array_equal(values, reference(seed, "w", kind, 0.3, 200))


@pytest.mark.parametrize("kind", KINDS)
def test_any_subset_in_any_order_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = one(kind).values("w")
    order = torch.randperm(values.numel())
    assert torch.equal(one(kind).at("w", order), values.flatten()[order])
    assert torch.equal(one(kind).at("w", order[:77].reshape(7, 11)), values.flatten()[order[:77]].reshape(7, 11))
    for chunk in (17, 4096):
        monkeypatch.setattr(start, "CHUNK", chunk)
        assert torch.equal(one(kind).values("w"), values)


def test_another_process_and_other_threads_give_the_same() -> None:
    program = (
        "import sys, torch; from fxprune.files.start import *; torch.set_num_threads(int(sys.argv[1]));"
        "s = Start(5, {kind: Origin(kind, 0.3, (40, 30, 3, 3)) for kind in KINDS});"
        "sys.stdout.buffer.write(b''.join(s.values(kind).numpy().tobytes() for kind in KINDS))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, "3"]
    printed = subprocess.run(command, capture_output=True, check=True).stdout
    starts = Start(5, {kind: Origin(kind, 0.3, (40, 30, 3, 3)) for kind in start.KINDS})
    assert printed == b"".join(starts.values(kind).numpy().tobytes() for kind in start.KINDS)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same(kind: str) -> None:
    values = one(kind).values("w", "cuda")
    assert values.is_cuda
    assert torch.equal(values.cpu(), one(kind).values("w"))
    models = [fxprune.initialize(convnet().to(device), 3) for device in ("cpu", "cuda")]
    for on_cpu, on_gpu in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(on_cpu, on_gpu.cpu())


def test_seeds_names_and_parameters_have_streams_of_their_own() -> None:
    origins = {name: KINDS["normal"] for name in ("a", "b")}
    streams = [Start(seed, origins).values(name).flatten() for seed in (0, 1) for name in origins]
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(4)
    assert correlations.abs().max() < 4.5 / math.sqrt(streams[0].numel())


# ------------------------------------------------------------------------------------------------- how they spread


def big(kind: str) -> Tensor:
    """A million values of scale 1."""
    return Start(11, {"w": Origin(kind, 1.0, (1000, 1000))}).values("w").flatten().double()


def near(actual: float, expected: float, deviation: float, count: int) -> None:
    """Within five standard errors."""
    assert abs(actual - expected) < 5 * deviation / math.sqrt(count), (actual, expected)


def test_uniform_values_are_uniform() -> None:
    values = big("uniform")
    n = len(values)
    assert values.abs().max() < 1
    near(values.mean().item(), 0.0, math.sqrt(1 / 3), n)
    near(values.square().mean().item(), 1 / 3, math.sqrt(4 / 45), n)
    counts = torch.histc(values, 256, -1, 1)
    chi2 = ((counts - n / 256).square() / (n / 256)).sum().item()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def test_normal_values_are_nearly_normal() -> None:
    values = big("normal")
    n = len(values)
    assert 3.3 < values.abs().max() < 3.4642
    near(values.mean().item(), 0.0, 1.0, n)
    near(values.square().mean().item(), 1.0, math.sqrt(1.7), n)
    near(values.pow(3).mean().item(), 0.0, math.sqrt(12), n)
    near(values.pow(4).mean().item(), 2.7, math.sqrt(50), n)  # a sum of four uniforms; a normal has 3
    for bound, share in ((1.0, 0.6827), (2.0, 0.9545)):  # of a normal
        assert abs((values.abs() < bound).double().mean().item() - share) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_independent(kind: str) -> None:
    values = big(kind)
    values = (values - values.mean()) / values.std()
    for lag in (1, 2, 3, 16, 1000):
        near((values[lag:] * values[:-lag]).mean().item(), 0.0, 1.0, len(values) - lag)


def test_every_bit_is_as_often_one_as_zero() -> None:
    random = start.mix_bits(start.derive_key(0, "w"), torch.arange(100_000))
    for bit in range(64):
        near(((random >> bit) & 1).double().mean().item(), 0.5, 0.5, 100_000)


FANS = {
    "kaiming_normal": lambda w: nn.init.kaiming_normal_(w),
    "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w),
    "kaiming_normal fan_out": lambda w: nn.init.kaiming_normal_(w, mode="fan_out"),
    "kaiming_uniform fan_out": lambda w: nn.init.kaiming_uniform_(w, mode="fan_out"),
    "xavier_normal": lambda w: nn.init.xavier_normal_(w),
    "xavier_uniform": lambda w: nn.init.xavier_uniform_(w),
}


@pytest.mark.parametrize("shape", [(60, 50), (40, 30, 3, 3), (30, 20, 3, 3, 3)])
@pytest.mark.parametrize("rule", FANS)
def test_fan_rules_are_those_of_torch(rule: str, shape: tuple[int, ...]) -> None:
    torch_values = FANS[rule](torch.empty(shape))
    values = Start(0, {"w": by_fans(rule, "w", shape)}).values("w")
    assert values.std().item() == pytest.approx(torch_values.std().item(), rel=0.05)
    if "uniform" in rule:
        assert values.abs().max().item() == pytest.approx(torch_values.abs().max().item(), rel=0.01)


# ---------------------------------------------------------------------------------------------------- models


def test_layers_start_as_layers_do() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 8, 3),
            "zero": nn.Linear(8, 8),
            "norm": nn.BatchNorm2d(8),
            "trained": nn.LayerNorm(8),
            "embedding": nn.Embedding(100, 8),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    model.register_parameter("token", nn.Parameter(torch.randn(5, 7)))
    nn.init.zeros_(model["zero"].weight)
    nn.init.normal_(model["trained"].weight)
    assert fxprune.initialize(model, 3) is model
    origins = start_of(model).origins
    drawn = {name: (origin.kind, round(origin.scale, 4)) for name, origin in origins.items()}
    assert drawn["conv.weight"] == ("normal", round(math.sqrt(2 / 36), 4))
    assert drawn["conv.bias"] == ("uniform", round(1 / 6, 4))
    assert drawn["zero.weight"] == ("constant", 0)
    assert drawn["norm.weight"] == drawn["trained.weight"] == ("constant", 1)
    assert drawn["norm.bias"] == ("constant", 0)
    assert drawn["embedding.weight"] == ("normal", 1)
    assert drawn["attention.in_proj_weight"] == ("uniform", round(math.sqrt(6 / 32), 4))
    assert drawn["token"] == ("normal", 0.02)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start_of(model).values(name))


def test_a_layer_with_one_output_starts_by_the_seed_alone() -> None:
    first, second = (fxprune.initialize(nn.Sequential(nn.Linear(4, 1), nn.PReLU()), 3) for _ in range(2))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert first.get_parameter("0.bias") != 0
    assert first.get_parameter("1.weight") == 0.25  # a value that is no draw stays


def test_rules_go_before_the_layers_own() -> None:
    rules = {"0.weight": ("uniform", 0.1), "0.*": ("constant", 3), "4.*": ("constant", 0.5)}
    model = fxprune.initialize(convnet(), 0, rules)
    assert (model[0].bias == 3).all()
    assert 0.09 < model[0].weight.abs().max() < 0.1
    assert (model[4].weight == 0.5).all()
    assert (model[4].bias == 0.5).all()
    assert (model[1].weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_from_float32(dtype: torch.dtype) -> None:
    model, reference = fxprune.initialize(convnet().to(dtype), 1), fxprune.initialize(convnet(), 1)
    for narrow, wide in zip(model.parameters(), reference.parameters(), strict=True):
        assert narrow.dtype == dtype
        assert torch.equal(narrow, wide.to(dtype))


def test_the_memory_format_does_not_matter() -> None:
    model = convnet().to(memory_format=torch.channels_last)
    assert all(
        map(torch.equal, fxprune.initialize(model, 1).parameters(), fxprune.initialize(convnet(), 1).parameters())
    )


def test_traces_copies_and_pickles_remember(tmp_path: Path) -> None:
    model, inputs = prepare(MODELS["residual"])
    fxprune.initialize(model, 4)
    graph = fxprune.trace(copy.deepcopy(model), inputs)
    torch.save(copy.deepcopy(graph), tmp_path / "graph.pt")
    again = torch.load(tmp_path / "graph.pt", weights_only=False)
    for copied in (graph, again):
        assert start_of(copied).to_json() == start_of(model).to_json()
    assert start_of(prepare(MODELS["residual"])[0]) is None


@pytest.mark.parametrize("name", ["residual_projection", "shufflenet", "depthwise_separable", "tied_decoder"])
def test_after_cuts_a_weight_has_the_start_of_its_original_index(name: str) -> None:
    model, inputs = prepare(MODELS[name])
    graph = fxprune.trace(fxprune.initialize(model, 4), inputs)
    analysis = fxprune.analyze(graph, inputs)
    for seed in range(3):
        plan = thinner(analysis, seed)
        graph, _ = fxprune.rewrite(graph, analysis, plan)
        analysis = analysis.after(plan, graph)
        begin = start_of(graph)
        for key, parameter in graph.named_parameters():
            assert torch.equal(parameter, begin.values(key).to(parameter.dtype))
            assert begin.shape(key) == tuple(parameter.shape)
    assert Start.from_json(begin.to_json()).origins == begin.origins


def test_start_values_that_decay_end_at_zero() -> None:
    begin = one("normal")
    half = begin.decayed(0.5)
    assert torch.equal(half.values("w"), begin.values("w") * 0.5)
    late = begin.decayed(1e-9).values("w")
    assert late.abs()[late != 0].min() >= 1e-10
    assert 0 < (late == 0).sum() < late.numel()
    assert not begin.decayed(1e-11).values("w").any()


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1.5}, "seed=1.5 must be an integer"),
        ({"seed": True}, "seed=True must be an integer"),
        ({"rules": {"nope.*": ("constant", 1)}}, "'nope.*' matches none of the parameters"),
        ({"rules": {"0.weight": "he"}}, "0.weight can't start as 'he': use 'kaiming_normal'"),
        ({"rules": {"0.weight": "xavier_normal fan_out"}}, "can't start as 'xavier_normal fan_out'"),
        ({"rules": {"0.weight": "kaiming_normal fan"}}, "can't start as 'kaiming_normal fan'"),
        ({"rules": {"1.weight": "kaiming_normal"}}, r"1.weight can't start as .* it has the shape \(8,\)"),
        ({"rules": {"0.weight": ("cauchy", 1)}}, "can't start as 'cauchy' 1.0: the kinds are 'uniform'"),
        ({"rules": {"0.weight": ("normal", math.inf)}}, "can't start as 'normal' inf"),
        ({"rules": {"0.weight": ("normal",)}}, r"0.weight can't start as \('normal',\)"),
        ({"model": convnet().to("meta")}, "0.weight is torch.float32 on meta"),
        ({"model": "model"}, "model must be a Module"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    model = arguments.pop("model", None) or convnet()
    before = copy.deepcopy(model)
    with pytest.raises(InitializeError, match=message):
        fxprune.initialize(model, arguments.pop("seed", 0), **arguments)
    if isinstance(model, nn.Module):
        assert start_of(model) is None
        assert all(p.is_meta or torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_another_generator_is_refused() -> None:
    data = one("normal").to_json() | {"generator": "splitmix64 2"}
    with pytest.raises(
        InitializeError, match="those of generator 'splitmix64 2'; this version of fxprune has 'splitmix64 1'"
    ):
        Start.from_json(data)
