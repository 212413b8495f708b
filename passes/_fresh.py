"""New weights for the layers of a model, as its modules draw them."""

import torch
from torch import nn

from fxprune.errors import PlanError
from fxprune.training.distributed import gather_values


def check_fresh(model: nn.Module) -> None:
    """Raise PlanError where parameters belong to a module that can't give them new values."""
    for name, module in model.named_modules():
        names = [parameter for parameter, value in module._parameters.items() if value is not None]
        if names and not hasattr(module, "reset_parameters"):
            where = f"{name}.{names[0]}".removeprefix(".")
            raise PlanError(
                f'weights="reinit" can\'t start {where} again: its module has no reset_parameters(). Use weights="keep"'
            )


def draw_weights(model: nn.Module) -> None:
    """New weights for all layers, the same on every rank: torch's random numbers give the seed."""
    seed = gather_values(int(torch.randint(2**62, ())))[0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            getattr(module, "reset_parameters", lambda: None)()
