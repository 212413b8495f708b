"""Weights from a file, read without running code from it."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.channels.analysis import abridge_list
from fxprune.errors import FileError
from fxprune.files.model import describe_tensor, read_model

INSIDE = ("state_dict", "model_state_dict", "model", "model_ema", "weights")  # where checkpoints keep the weights
WRAPPERS = ("module.", "_orig_mod.", "model.")


def load_weights(model: nn.Module, path: str) -> None:
    """Give ``model`` the weights in a file; all must fit. Raises FileError, and nothing is changed then."""
    if is_ours(Path(path)):
        raise FileError(f"{path} holds a model that fxprune wrote, and not weights for another: give it as the MODEL")
    state = without_prefix(read_state(Path(path)), set(model.state_dict()))
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    foreign = [name for name in state if name not in expected]
    if missing or foreign:
        lacks = f"it lacks {abridge_list(missing, 3)}" if missing else ""
        has = f"it has {abridge_list(foreign, 3)} besides" if foreign else ""
        raise FileError(f"{path} does not fit the model: {' and '.join(filter(None, (lacks, has)))}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise FileError(
                f"{path} does not fit the model: {name} is {describe_tensor(tensor)} in the file, "
                f"{describe_tensor(expected[name])} in the model. Has it another number of classes? Say so with "
                "--classes."
            )
    model.load_state_dict(state, strict=False)


def is_ours(path: Path) -> bool:
    """Whether fxprune wrote this file of a pruned model."""
    try:
        return path.suffix == ".safetensors" and "plan" in read_model(path)[0]
    except FileError:
        return False


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of safetensors or ``torch.save``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise FileError(
            f"can't read weights from {path}: it is damaged, or no state_dict. Only plain weights are read, no pickled "
            "modules: save them with torch.save(model.state_dict(), path)"
        ) from error
    for name in INSIDE:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileError(f"{path} holds no state_dict: save one with torch.save(model.state_dict(), path)")
    return state


def without_prefix(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """``state`` without what DistributedDataParallel, torch.compile and trainers put before every name."""
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in expected):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
