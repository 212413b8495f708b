"""What ranks must have in common before a cut: if all of it is the same, so is the model after it."""

import hashlib
from dataclasses import asdict, is_dataclass

from fxprune.channels.analysis import Analysis
from fxprune.plan import Plan
from fxprune.training import distributed
from fxprune.training.run import Run, TrainingPass


def require_same_cut(run: Run, plan: Plan | None) -> None:
    """Raise SessionError on every rank unless all are about to make the same cut, or none.

    Raises:
        SessionError: names what differs, and on which ranks.
    """
    if distributed.count_ranks() == 1 or not distributed.any_rank(plan is not None):
        return
    distributed.require_agreement(
        {
            "the options of the session": [dict(run.analysis.options), run.reset_state, run.verify],
            "the passes": [describe_pass(training_pass) for training_pass in run.passes],
            "the steps and epochs made": [run.step, run.epoch],
            "the analysis": hash_analysis(run.analysis),
            "the plan": None if plan is None else plan.to_json(),
        }
    )


def describe_pass(training_pass: TrainingPass) -> list[object]:
    """The name of a pass and its options, but for those that are no plain data: the text of a function differs."""
    options: dict[str, object] = asdict(training_pass) if is_dataclass(training_pass) else {}
    plain = {name: value for name, value in options.items() if isinstance(value, (str, int, float, type(None)))}
    return [type(training_pass).__name__, plain]


def hash_analysis(analysis: Analysis) -> str:
    """Stands for which position on which axis of which parameter is which channel."""
    digest = hashlib.sha256()
    for group in analysis.groups.values():
        for member in group.members:
            digest.update(repr((group.name, group.size, member.parameter, member.axis)).encode())
            digest.update(member.index.tobytes())
            digest.update(member.channel.tobytes())
    return digest.hexdigest()
