"""Models by name: torchvision:NAME, timm:NAME, package.module:factory, file.py:factory, or a file from fxprune.

What a file says is data: it may name a model of torchvision or timm, which are looked up, but no code to import. A
model of any other kind must be named by the user.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.budget.timing import stand_in
from fxprune.cli.say import print_note
from fxprune.cli.weights import load_weights
from fxprune.errors import FileError, FxpruneError
from fxprune.files.model import read_model
from fxprune.graph.inputs import bind_inputs, imagine_inputs, map_tensors, tensors_in
from fxprune.plan import Plan

LOOKED_UP = ("torchvision", "timm")
DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool")


class UsageError(FxpruneError):
    """Options that do not go together."""


class ModelError(FxpruneError):
    """A model can't be found or built from what was typed."""


@dataclass(frozen=True)
class Source:
    """Where a model is from: all that it takes to build it again, but for the weights.

    A plan holds it, so that plan.json and model.safetensors know what they were made of.
    """

    model: str
    classes: int | None = None
    input: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, str]:
        """As a plan holds it."""
        found = {"model": self.model, "input": " ".join(self.input)}
        return found | ({} if self.classes is None else {"classes": str(self.classes)})

    @classmethod
    def of(cls, plan: Plan, named: str | None, path: str | Path) -> "Source":
        """The source that a plan in the file ``path`` tells, or ``named``, which the user typed."""
        told = plan.source
        model = named or told.get("model")
        if model is None:
            raise ModelError(f"{path} does not say which model it was made of; say so with --model")
        if named is None and split_name(model)[0] not in LOOKED_UP:
            raise ModelError(
                f"{path} was made of {model!r}. Building that runs code, which a file may not choose: if you trust it, "
                f"say --model {model}"
            )
        classes = told.get("classes", "")
        return cls(model, int(classes) if classes.isdecimal() else None, tuple(told.get("input", "").split()))


@dataclass(frozen=True)
class Opened:
    """A model in eval mode, its example inputs, and where it is from."""

    model: nn.Module
    inputs: Any
    source: Source


def open_model(
    name: str,
    *,
    weights: str | None = None,
    classes: int | None = None,
    inputs: list[str] | None = None,
    seed: int = 0,
    named: str | None = None,
    weights_matter: bool = True,
) -> Opened:
    """The model called ``name``. ``named``: what a file was made of, where it can't say so."""
    torch.manual_seed(seed)
    if name.endswith(".safetensors"):
        return open_file(name, weights, inputs, named)
    source = Source(name, classes, tuple(inputs or ()))
    model, published = build_model(source, weights)
    if weights is None and weights_matter:
        print_note(f"the weights of {name} are random; give those that you mean with --weights")
    elif weights is not None and not published:
        load_weights(model, weights)
    source = source if source.input else replace(source, input=usual_input(name))
    return check_model(model, make_example(source, model), source)


def open_file(path: str, weights: str | None, inputs: list[str] | None, named: str | None) -> Opened:
    """A model that fxprune wrote."""
    record, _ = read_model(path)
    if "plan" not in record:
        raise ModelError(f"{path} was not pruned: it holds a model from fxprune.initialize, for fxprune.load to read")
    plan = Plan.from_json(record["plan"])
    source = Source.of(plan, named, path)
    model = fxprune.load(path, build_model(source, None)[0])
    if weights is not None:
        load_weights(model, weights)
    if inputs:
        return check_model(model, make_example(replace(source, input=tuple(inputs)), model), source)
    kept = map_tensors(lambda tensor: stand_in(tensor, torch.device("cpu")), imagine_inputs(record["example_inputs"]))
    return check_model(model, make_example(source, model) if source.input else kept, source)


def check_model(model: nn.Module, inputs: Any, source: Source) -> Opened:
    """The model in eval mode, if it runs on these inputs."""
    args, kwargs = bind_inputs(inputs)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model.eval()(*args, **kwargs)
    except Exception as error:
        shapes = " and ".join(",".join(map(str, each.shape)) for each in tensors_in(inputs))
        raise ModelError(
            f"{source.model} does not run on inputs of shape {shapes}: {type(error).__name__}: {error}. Give others "
            "with --input."
        ) from error
    return Opened(model, inputs, source)


def split_name(model: str) -> tuple[str, str]:
    """Where a model is from, and what it is called there: ("torchvision", "resnet50"), ("package.module", "factory").

    Whoever asks whether a file may name a model, and whoever builds it, must read the name alike.
    """
    kind, _, name = model.rpartition(":")
    return kind, name


def build_model(source: Source, weights: str | None) -> tuple[nn.Module, bool]:
    """The model, and whether ``weights`` were the name of published ones, which it has then."""
    kind, name = split_name(source.model)
    if not kind or not name:
        raise ModelError(
            f"{source.model!r} names no model: give torchvision:NAME, timm:NAME, package.module:factory, "
            "path/to/file.py:factory, or a model.safetensors that fxprune wrote"
        )
    options: dict[str, Any] = {} if source.classes is None else {"num_classes": source.classes}
    published = weights is not None and not Path(weights).suffix and not Path(weights).exists()
    if kind == "torchvision":
        make = torchvision_model(name, options, weights if published else None)
    elif kind == "timm":
        make = timm_model(name, options, published)
    elif published:
        raise FileError(f"there is no file {weights}")
    else:
        make = find_factory(kind, name, options)
    try:
        model = make()
    except FxpruneError:
        raise
    except Exception as error:
        raise ModelError(f"{source.model} can't be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{source.model} gives a {type(model).__name__}, but must give a torch.nn.Module")
    return model, published


def torchvision_model(name: str, options: dict[str, Any], weights: str | None) -> Callable[[], nn.Module]:
    """A model of torchvision; nothing is downloaded unless ``weights`` says so."""
    from torchvision import models

    if name not in models.list_models():
        raise ModelError(f"torchvision has no model {name!r}{suggest_names(name, models.list_models())}")
    known = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in known:
        options = {**options, "weights_backbone": None}
    if weights is not None and weights not in (*models.get_model_weights(name).__members__, "DEFAULT"):
        names = ", ".join(models.get_model_weights(name).__members__) or "none"
        raise FileError(f"there is no file {weights}, and torchvision has no such weights of {name} (it has: {names})")
    return lambda: models.get_model(name, weights=weights, **options)


def timm_model(name: str, options: dict[str, Any], pretrained: bool) -> Callable[[], nn.Module]:
    """A model of timm."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise ModelError(f"timm:{name} needs timm: pip install timm") from None
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}{suggest_names(name, timm.list_models())}")
    return lambda: timm.create_model(name, pretrained=pretrained, **options)


def find_factory(place: str, name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    """A class or function of the user's own, in a module or a file; it is called without arguments, but ``options``."""
    make = find_object(place, name)
    if not callable(make):
        raise ModelError(f"{place} has no class or function {name!r}: that is a {type(make).__name__}")
    return lambda: make(**options)


def find_object(place: str, name: str) -> object:
    """What is called ``name`` in a module or a file."""
    try:
        if place.endswith(".py"):
            module = from_file(Path(place))
        else:
            sys.path.insert(0, "")  # as python -m does
            try:
                module = importlib.import_module(place)
            finally:
                sys.path.remove("")
    except FxpruneError:
        raise
    except Exception as error:
        raise ModelError(f"{place} can't be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        callables = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ModelError(f"{place} has no class or function {name!r}{suggest_names(name, callables)}")
    return found


def from_file(path: Path) -> Any:
    """Import a file by its path. What stands beside it can be imported from now on, as when Python runs the file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ModelError(f"there is no file {path}")
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def suggest_names(name: str, known: list[str]) -> str:
    """The names most like ``name``, as the rest of a sentence."""
    import difflib

    found = difflib.get_close_matches(name, known, 3, 0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def usual_input(name: str) -> tuple[str, ...]:
    """The shape of the input that a model of torchvision or timm is made for."""
    kind, model = split_name(name)
    if kind == "timm":
        timm = importlib.import_module("timm")
        cfg = timm.get_pretrained_cfg(model)
        return (",".join(map(str, (1, *(cfg.input_size if cfg else (3, 224, 224))))),)
    if kind != "torchvision":
        raise ModelError(f"what does {name} take? Give the shape of an example input: --input 1,3,224,224")
    from torchvision import models

    place = models.get_model_builder(model).__module__
    if ".optical_flow." in place:
        return ("1,3,128,128",) * 2
    crop = next((getattr(each.transforms(), "crop_size", None) for each in models.get_model_weights(model)), None)
    height, width = (list(crop) * 2)[:2] if crop else (224, 224)
    return (f"1,3,16,{height},{width}" if ".video." in place else f"1,3,{height},{width}",)


def make_example(source: Source, model: nn.Module) -> Any:
    """Random inputs of the shapes that ``source`` has; images in a list for a detector of torchvision."""
    tensors = tuple(map(make_tensor, source.input))
    if type(model).__module__.startswith("torchvision.models.detection"):
        return ([image.sigmoid() for batch in tensors for image in batch],)
    return tensors


def make_tensor(shape: str) -> Tensor:
    """Random numbers for "1,3,224,224", zeros for "int64:1,128"."""
    dtype, _, sizes = shape.rpartition(":")
    dtype = dtype or "float32"
    parts = sizes.replace("x", ",").split(",")
    if dtype not in DTYPES or not all(part.isdecimal() and int(part) for part in parts):
        raise ModelError(
            f"{shape!r} is no shape; give sizes such as 1,3,224,224, and before them a type if it is not float32: "
            f"int64:1,128 (of {', '.join(DTYPES)})"
        )
    sized, kind = [int(part) for part in parts], getattr(torch, dtype)
    try:
        return torch.randn(sized).to(kind) if kind.is_floating_point else torch.zeros(sized, dtype=kind)
    except RuntimeError as error:
        raise ModelError(f"an input of shape {shape} does not fit into memory") from error
