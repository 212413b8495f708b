"""What every test has: one thread, float32 by default, no GPU tests without a GPU, hypothesis without a deadline."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from ranks import Ranks

torch.set_num_threads(1)

quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", deadline=None, suppress_health_check=quiet)
settings.register_profile("ci", deadline=None, suppress_health_check=quiet, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    """Each test starts with the default dtype and seed, whatever the one before did."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Processes that train together."""
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture
def own_tables() -> Iterator[None]:
    """What a test says of operators is forgotten after it."""
    from fxprune.channels import tensor
    from fxprune.rewrite import attributes, fit, norms

    tables: list[Any] = [tensor.RULES, tensor.KEEPS_ZERO, tensor.STATISTICS]
    tables += [fit.FITTERS, attributes.ATTRIBUTES, norms.NORMS_OVER_KEPT]
    before = [table.copy() for table in tables]
    yield
    for table, copy in zip(tables, before, strict=True):
        table.clear()
        table.update(copy)
    tensor._resolved.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
