"""State: what a model's Python may keep from one run to the next, beside parameters and buffers.

That is in the attributes of its modules, and around its code: in those of its classes, and in globals, enclosing
variables and default arguments of the functions that it calls. A picture of all that shows what a run has changed.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import _lru_cache_wrapper
from inspect import unwrap
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from fxprune.graph.numbers import Number
from fxprune.graph.places import PACKAGES, is_users
from fxprune.graph.traced import ATOMS, hooks_of

TORCHS = frozenset(vars(nn.Module()))  # the attributes that torch itself keeps in a module
NAMED = (type, ModuleType, FunctionType, BuiltinFunctionType, _lru_cache_wrapper)  # told by their names
DATA = frozenset(  # whose objects hold data
    ("argparse", "builtins", "collections", "functools", "itertools", "numpy", "random", "torch", "types")
)
LIBRARIES = frozenset(("torch", "fxprune")) | sys.stdlib_module_names
Modules = Mapping[str, nn.Module]  # by their paths


class Variable(NamedTuple):
    """A variable around a model's code."""

    words: str
    owner: Any  # a dict, or an object with attributes
    name: str

    def read(self) -> Any:
        """Its value; None where it is gone."""
        if isinstance(self.owner, dict):
            return self.owner.get(self.name)
        return vars(self.owner).get(self.name) if isinstance(self.owner, type) else getattr(self.owner, self.name)

    def write(self, value: Any) -> None:
        """Give it this value."""
        if self.read() is value:
            return
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)


class Surroundings(NamedTuple):
    """What there is around a model's code."""

    variables: list[Variable]
    caches: list[Any]  # functions under ``functools.lru_cache``


def surroundings_of(modules: Iterable[nn.Module]) -> Surroundings:
    """The variables that code of modules may change: those of their classes and of the functions that they call."""
    around = Surroundings([], [])
    waiting: list[Any] = list({type(module): None for module in modules if is_own(type(module))})
    for module in modules:
        hooks = [hook for own in module._parameters.values() if own is not None for _, hook in hooks_of(own)]
        held = (*vars(module).values(), *module._forward_hooks.values(), *module._forward_pre_hooks.values(), *hooks)
        waiting += [value for value in held if isinstance(value, FunctionType)]
    seen: set[int] = set()
    for item in waiting:  # it grows
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, _lru_cache_wrapper):
            around.caches.append(item)
        for variable in variables_in(item):
            value = variable.read()
            code = getattr(value, "fget", getattr(value, "__func__", value))  # of a property, or a method of the class
            if isinstance(code, (FunctionType, _lru_cache_wrapper)) or (isinstance(code, type) and is_own(code)):
                waiting.append(code)
            elif is_data(value):
                around.variables.append(variable)
    return around


def variables_in(item: Any) -> Iterator[Variable]:
    """The variables of a class, or those that a function of the user's names."""
    if isinstance(item, type):
        for base in filter(is_own, item.__mro__):
            words = f"of class {base.__qualname__}"
            yield from (Variable(f"attribute {name!r} {words}", base, name) for name in vars(base) if name[:2] != "__")
        return
    function = unwrap(item)
    if not isinstance(function, FunctionType) or not is_users(function.__code__.co_filename):
        return
    place, scope = f"of function {function.__qualname__}", function.__globals__
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if is_filled(cell):
            yield Variable(f"variable {name!r} {place}", cell, "cell_contents")
    if not function.__code__.co_filename.startswith(PACKAGES):  # a package has many, and rarely counts with one
        for name in sorted(names_in(function.__code__) & scope.keys()):
            yield Variable(f"global {name!r} of {function.__module__}", scope, name)
    if function.__defaults__:
        yield Variable(f"a default argument {place}", function, "__defaults__")
    yield from (Variable(f"attribute {name!r} {place}", vars(function), name) for name in vars(function))


def is_filled(cell: CellType) -> bool:
    """Whether an enclosing variable has a value yet."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def is_own(kind: type) -> bool:
    """Whether a class is neither of torch nor of Python's library."""
    return kind.__module__.partition(".")[0] not in LIBRARIES


def is_data(value: Any) -> bool:
    """Whether a value may be what a model counts with."""
    kind = type(value)
    if isinstance(value, (nn.Module, *NAMED)):
        return False
    return kind.__module__.partition(".")[0] in DATA or is_own(kind)


def names_in(code: CodeType) -> set[str]:
    """The names of attributes and globals in a function, and in those within it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(names_in, inner))


# ------------------------------------------------------------------------------------------------------------ pictures

Key = tuple[str | None, str]  # the path of a module, and an attribute of it; None, and the words for a variable


class Unknown:
    """Stands for tensors: which one it is says nothing."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


UNKNOWN = Unknown()


class Picture:
    """How the state of a model looks: the attributes of its modules, and variables around their code."""

    def __init__(self, modules: Modules, variables: list[Variable]) -> None:
        self.forms: dict[Key, Any] = {}  # plain values, equal where nothing has changed
        self.tensors: dict[Key, list[Tensor]] = {}  # that are kept there
        self.seen: dict[int, tuple[Any, Any]] = {id(module): (module, path) for path, module in modules.items()}
        for path, module in modules.items():
            for name, value in vars(module).items():
                if name not in TORCHS:
                    self.draw((path, name), value)
        for variable in variables:
            self.draw((None, variable.words), variable.read())
        self.seen.clear()

    def draw(self, key: Key, value: Any) -> None:
        """Add a value."""
        self.key, self.start = key, len(self.seen)
        self.forms[key] = self.form_of(value)

    def form_of(self, value: Any) -> Any:
        """What a value holds, as plain data. Of an object that is what it gives for a copy of itself."""
        kind = type(value)
        if kind in ATOMS:
            return value
        if isinstance(value, Tensor):
            self.tensors.setdefault(self.key, []).append(value)
            return UNKNOWN
        if isinstance(value, Number):
            return value.__reduce__()[1][0]
        if isinstance(value, NAMED):
            return getattr(value, "__qualname__", value.__name__)
        if id(value) in self.seen:
            return self.seen[id(value)][1]
        self.seen[id(value)] = value, (self.key, len(self.seen) - self.start)  # kept, so that no other has its id
        if kind in (list, tuple):
            return kind.__name__, list(map(self.form_of, value))
        if kind is dict:
            return {key: self.form_of(item) for key, item in value.items()}
        if kind in (set, frozenset, bytes):
            return kind(value)
        if not is_data(value):
            return kind.__qualname__
        try:
            made = value.__reduce_ex__(4)
        except Exception:  # it can't be copied
            return object() if isinstance(value, Iterator) else kind.__qualname__  # a generator moves on unseen
        if isinstance(made, str):
            return made
        items = [list(part or ()) for part in made[3:5]]
        return kind.__qualname__, [self.form_of(part) for part in (*made[1:3], *items)]

    def changes(self, before: "Picture") -> list[Key]:
        """What looks different from an earlier picture."""
        return [key for key, form in self.forms.items() if (before.forms.get(key),) != (form,)]


def describe_key(key: Key) -> str:
    """An attribute or variable in a message."""
    path, name = key
    if path is None:
        return name
    return f"attribute {name!r} of {f'module {path}' if path else 'the model'}"
