"""The laws over random networks of Python, and what those have found, each as small as it gets."""

import contextlib

import pytest
from laws import OPTIMIZERS, graph_is_model, pruned_again, pruning_composes, random_plan, slice_commutes_with_a_step
from laws import slice_is_zero as hold_law_one
from models import randomize
from python_networks import Network, network_from_seed, read_idioms

import fxprune
from fxprune.errors import PlanError


def hold_the_laws(network: Network) -> None:
    """All laws on one network, each under a random plan. What fails is to be seen in ``network.source``."""
    seed = network.seed
    model, example = randomize(network.build(), seed).double().eval(), network.inputs(4)
    graph = fxprune.trace(model, example)
    graph_is_model(graph, model, [example, network.inputs(5)])
    analysis = fxprune.analyze(graph, example)
    hold_law_one(graph, example, analysis, random_plan(analysis, seed))
    optimizer = [*OPTIMIZERS.values()][seed % len(OPTIMIZERS)]
    slice_commutes_with_a_step(graph, example, analysis, random_plan(analysis, seed + 5), optimizer)
    pruning_composes(graph, example, analysis, random_plan(analysis, seed + 1, least=2), seed + 2)
    with contextlib.suppress(PlanError):  # other groups are found: refused, and never another model
        pruned_again(graph, example, analysis, random_plan(analysis, seed + 3), seed + 4)


@pytest.mark.parametrize("seed", range(20))
def test_random_python(seed: int) -> None:
    hold_the_laws(network_from_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 420))
def test_more_random_python(seed: int) -> None:
    hold_the_laws(network_from_seed(seed))


def test_networks_are_made_again_and_use_every_piece() -> None:
    assert network_from_seed(3) == network_from_seed(3)
    source = "".join(network_from_seed(seed).source for seed in range(400))
    pieces = [idiom.forward.split("$x")[0].split("$n")[0].split("$y")[-1].strip() for idiom in read_idioms()]
    assert [piece for piece in pieces if piece not in source] == []
