"""Backends: what runs a model, for measuring: PyTorch as it is, torch.compile, onnxruntime on a CPU or a GPU."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.budget.timing import make_forward
from fxprune.errors import BenchError
from fxprune.files.export import export_onnx
from fxprune.graph.inputs import Bound, tensors_in
from fxprune.graph.traced import copy_model

ForwardPass = Callable[[], Any]


def run_eager(model: nn.Module, inputs: Bound, threads: int) -> ForwardPass:
    """PyTorch as it is."""
    return make_forward(model, inputs)


def run_compiled(model: nn.Module, inputs: Bound, threads: int) -> ForwardPass:
    """``torch.compile`` with its default options, compiled here."""
    run = make_forward(torch.compile(copy_model(model), dynamic=False), inputs)
    run()
    return run


def run_onnxruntime(model: nn.Module, inputs: Bound, threads: int) -> ForwardPass:
    """Onnxruntime on the CPU."""
    session, feeds = load_session(model, inputs, threads, "CPUExecutionProvider")
    return lambda: session.run(None, feeds)


def onnxruntime_cuda(model: nn.Module, inputs: Bound, threads: int) -> ForwardPass:
    """Onnxruntime on the GPU; inputs and outputs stay there."""
    import onnxruntime as ort

    session, feeds = load_session(model, inputs, threads, "CUDAExecutionProvider")
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")
    return lambda: session.run_with_iobinding(binding)


def load_session(model: nn.Module, inputs: Bound, threads: int, provider: str) -> tuple[Any, dict[str, Any]]:
    """The model in onnxruntime, and what to feed it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, inputs, path, dynamic_batch=False)
        session = ort.InferenceSession(str(path), options, providers=[provider])
    if provider not in session.get_providers():
        raise BenchError(f"onnxruntime can't use {provider} here")
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors_in(inputs)]
    return session, {slot.name: array for slot, array in zip(session.get_inputs(), arrays, strict=True)}


BACKENDS: dict[str, Callable[[nn.Module, Bound, int], ForwardPass]] = {
    "eager": run_eager,
    "compile": run_compiled,
    "onnxruntime": run_onnxruntime,
    "onnxruntime-cuda": onnxruntime_cuda,
}


def usual_backends(device: torch.device) -> tuple[str, ...]:
    """The backends that there are for a device."""
    return tuple(BACKENDS) if device.type == "cuda" else tuple(name for name in BACKENDS if "cuda" not in name)


def repeat_samples(tensor: Tensor, size: int) -> Tensor:
    """The samples of a tensor, repeated until there are ``size``."""
    if not tensor.ndim:
        return tensor
    return tensor[torch.arange(size, device=tensor.device) % tensor.shape[0]].contiguous()
