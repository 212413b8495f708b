"""Files: what was saved is loaded bit by bit; anything else is refused, and nothing is executed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import MODELS, prepare
from safetensors import safe_open
from torch import Tensor, nn

import fxprune
from fxprune import Budget, TracedModule, passes
from fxprune.errors import FileError
from fxprune.files.sparse import bits_of

HALF = Budget(channels=0.6, tolerance=0.2)
TIED = ["tied_module", "tied_parameter", "tied_decoder"]


def compacted(name: str) -> tuple[nn.Module, TracedModule, Any]:
    model, inputs = prepare(MODELS[name])
    return model, fxprune.prune(model, inputs, passes.Magnitude(), budget=HALF), inputs


def save_and_read(compact: nn.Module, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of the file that ``save`` writes."""
    fxprune.save(compact, path)
    with safe_open(path, "pt") as file:
        return file.metadata(), safetensors.torch.load_file(path)


def outputs(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = inputs if isinstance(inputs[0], tuple) else (inputs, {})
    return model(*args, **kwargs)


def assert_loads(compact: TracedModule, path: Path, fresh: nn.Module, inputs: Any) -> TracedModule:
    loaded = fxprune.load(path, fresh)
    torch.testing.assert_close(outputs(loaded, inputs), outputs(compact, inputs), rtol=0, atol=0)
    state, expected = loaded.state_dict(), compact.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    return loaded


@pytest.mark.parametrize(
    "name",
    ["residual", "shufflenet", "two_inputs", "keyword_input", "dict_output", "auxiliary_head", "float_buffer", *TIED],
)
def test_round_trip(name: str, tmp_path: Path) -> None:
    _, compact, inputs = compacted(name)
    fxprune.save(compact, tmp_path / "model.safetensors")
    fresh, _ = prepare(MODELS[name], seed=3)  # other weights: they do not matter
    before = copy.deepcopy(fresh.state_dict())
    loaded = assert_loads(compact, tmp_path / "model.safetensors", fresh, inputs)
    assert all(torch.equal(tensor, before[key]) for key, tensor in fresh.state_dict().items())
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in compact.parameters()]  # tied where they were
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_pruned_and_trained_and_pruned_again(tmp_path: Path) -> None:
    model, compact, inputs = compacted("residual_projection")
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.add_(0.1)
    again = fxprune.prune(compact, inputs, passes.Random(1), budget=Budget(params=0.6, tolerance=0.1))
    fxprune.save(again, tmp_path / "model.safetensors")
    assert_loads(again, tmp_path / "model.safetensors", model, inputs)


def test_the_options_of_the_analysis_are_remembered(tmp_path: Path) -> None:
    name = "attention_matmul"
    model, inputs = prepare(MODELS[name])
    analysis = fxprune.analyze(model, inputs, heads="within")
    assert analysis.sizes != fxprune.analyze(model, inputs).sizes
    compact, _ = fxprune.rewrite(analysis.graph, analysis, passes.Random().plan(analysis, HALF))
    fxprune.save(compact, tmp_path / "model.safetensors")
    assert_loads(compact, tmp_path / "model.safetensors", model, inputs)


def test_a_loaded_model_goes_on(tmp_path: Path) -> None:
    model, compact, inputs = compacted("dropout")
    fxprune.save(compact.train(), tmp_path / "model.safetensors")
    loaded = fxprune.load(tmp_path / "model.safetensors", model.train())
    assert loaded.training
    loaded.eval()(*inputs).sum().backward()
    fxprune.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_there_is_no_pickle_inside(tmp_path: Path) -> None:
    _, compact, _ = compacted("chain")
    metadata, state = save_and_read(compact, tmp_path / "model.safetensors")
    assert set(state) == set(compact.state_dict())
    assert json.loads(metadata["fxprune"])["plan"]["format"] == "fxprune plan 1"


# ------------------------------------------------------------------------------------------- what is refused


def test_a_model_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="this Linear has no plan"):
        fxprune.save(nn.Linear(2, 2), tmp_path / "model.safetensors")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    _, compact, _ = compacted("chain")
    with pytest.raises(FileError, match=r"can't write .*nowhere/model.safetensors: .*No such file"):
        fxprune.save(compact, tmp_path / "nowhere" / "model.safetensors")


def test_example_inputs_that_json_can_not_hold(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, how: Any = None) -> Tensor:
            return self.b(self.a(x))

    compact = fxprune.prune(Scaled(), (torch.randn(2, 4), {1, 2}), passes.Random(), budget=HALF)
    with pytest.raises(FileError, match=r"can't write .* set is not JSON serializable"):
        fxprune.save(compact, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file(tmp_path: Path, keep: float) -> None:
    model, compact, _ = compacted("chain")
    path = tmp_path / "model.safetensors"
    fxprune.save(compact, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))] if isinstance(keep, float) else data[:keep])
    with pytest.raises(FileError, match=r"can't read a model from .*model.safetensors"):
        fxprune.load(path, model)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"there is no file .*missing"):
        fxprune.load(tmp_path / "missing", nn.Linear(2, 2))


def test_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(
        FileError, match=r"weights.safetensors is a safetensors file, but not one that fxprune.save wrote"
    ):
        fxprune.load(path, nn.Linear(2, 2))


def test_another_model(tmp_path: Path) -> None:
    _, compact, _ = compacted("chain")
    path = tmp_path / "model.safetensors"
    fxprune.save(compact, path)
    with pytest.raises(FileError, match="does not belong to this Sequential: this plan was made for another model"):
        fxprune.load(path, prepare(MODELS["residual"])[0])
    with pytest.raises(FileError, match="does not belong to this Linear"):
        fxprune.load(path, nn.Linear(10, 4))
    with pytest.raises(
        FileError, match=r"0.0.weight is float64\[\d+, 3, 3, 3\] in the file, float32\[\d+, 3, 3, 3\] in"
    ):
        fxprune.load(path, prepare(MODELS["chain"], dtype=torch.float32)[0])


def test_a_file_with_other_tensors(tmp_path: Path) -> None:
    model, compact, _ = compacted("chain")
    path = tmp_path / "model.safetensors"
    metadata, state = save_and_read(compact, path)
    name, tensor = next((name, tensor) for name, tensor in state.items() if tensor.ndim == 4)

    safetensors.torch.save_file({key: value for key, value in state.items() if key != name}, path, metadata)
    with pytest.raises(FileError, match=f"{name} is only in the model"):
        fxprune.load(path, model)
    safetensors.torch.save_file(state | {"extra": tensor.clone()}, path, metadata)
    with pytest.raises(FileError, match="extra is only in the file"):
        fxprune.load(path, model)
    safetensors.torch.save_file(state | {name: torch.zeros(1, 2, dtype=torch.float64)}, path, metadata)
    with pytest.raises(FileError, match=rf"{name} is float64\[1, 2\] in the file, float64\["):
        fxprune.load(path, model)


def example(*shape: int, dtype: str = "float64") -> Any:
    return {"example_inputs": {"args": [{"tensor": {"shape": shape, "dtype": dtype}}], "kwargs": {"dict": {}}}}


HOSTILE = [
    ("[" * 100_000, "can't read"),
    ("{", "can't read"),
    ("[]", "not one that fxprune.save wrote"),
    ({"format": "fxprune model 2"}, "not one that fxprune.save wrote .'fxprune model 1'"),
    ({"aliases": []}, "does not belong"),
    ({"aliases": {"a": ["b"]}}, "does not belong"),
    ({"aliases": {"a": "no such tensor"}}, "does not belong .* 'no such tensor'"),
    ({"plan": {}}, "does not belong .* not a plan"),
    ({"plan": {"format": "fxprune plan 1", "keep": {"0": [9]}, "sizes": {"0": 4}, "options": {}}}, "plan is damaged"),
    ({"example_inputs": None}, "does not belong"),
    (example(1, dtype="load"), "does not belong"),
    (example(2, 1 << 62, 8), "does not belong"),
    (example(2, 3, 1 << 20, 1 << 20), None),  # huge, but no memory is needed for it
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_a_hostile_file(tmp_path: Path, change: Any, message: str | None) -> None:
    model, compact, inputs = compacted("chain")
    path = tmp_path / "model.safetensors"
    metadata, state = save_and_read(compact, path)
    description = change if isinstance(change, str) else json.dumps(json.loads(metadata["fxprune"]) | change)
    safetensors.torch.save_file(state, path, {"fxprune": description})
    if message is None:
        assert_loads(compact, path, model, inputs)
        return
    with pytest.raises(FileError, match=f"(?s){message}"):
        fxprune.load(path, model)


# ------------------------------------------------------------------------------------------- kernels with zeros


def thinned(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, TracedModule, Any]:
    """A compact model of which half of each kernel is zero; some of the zeros are negative."""
    model, compact, inputs = compacted("chain")
    model, compact = model.to(dtype), compact.to(dtype)
    with torch.no_grad():
        for parameter in compact.parameters():
            if parameter.ndim == 4:
                parameter[:, :, 1:] *= 0.0
                parameter[0, 0, 0, 0] = torch.nan
    return model, compact, inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_in_kernels_take_no_space_and_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model, compact, _ = thinned(dtype)
    fxprune.save(compact, tmp_path / "model.safetensors")
    state = fxprune.load(tmp_path / "model.safetensors", model).state_dict()
    for name, tensor in compact.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(bits_of(state[name]), bits_of(tensor)), name
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weight = compact.get_parameter("1.0.weight")
    assert stored["1.0.weight"].shape == (int((bits_of(weight) != 0).sum()),)
    assert stored["1.0.weight:pattern"].shape == weight.shape[:2]


@pytest.mark.parametrize("damage", ["pattern", "pool", "values"])
def test_kernels_that_do_not_fit_their_patterns(damage: str, tmp_path: Path) -> None:
    model, compact, _ = thinned()
    path = tmp_path / "model.safetensors"
    metadata, stored = save_and_read(compact, path)
    if damage == "pattern":
        stored["1.0.weight:pattern"] += 100
    elif damage == "pool":
        stored["1.0.weight:pool"] = ~stored["1.0.weight:pool"]
    else:
        stored["1.0.weight"] = stored["1.0.weight"][1:]
    safetensors.torch.save_file(stored, path, metadata)
    with pytest.raises(FileError, match=r"does not belong to this Sequential: .*1\.0\.weight .*damaged"):
        fxprune.load(path, model)
