"""Classes of modules that are slow to import, or may not be there: looked up, and never imported for that."""

import sys
from typing import Any


def loaded_types(*names: str) -> tuple[type[Any], ...]:
    """The classes with these dotted names whose module is loaded. Nothing can be an instance of another.

    >>> loaded_types("torch.nn.Linear", "torchvision.no.such.Layer")
    (<class 'torch.nn.modules.linear.Linear'>,)
    """
    kinds = (getattr(sys.modules.get(module), name, None) for module, _, name in (n.rpartition(".") for n in names))
    return tuple(kind for kind in kinds if kind is not None)
