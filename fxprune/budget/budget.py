"""Budget and Bounds: what a compact model may cost, and what may be done to each group on the way there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from numbers import Integral

from fxprune.errors import BudgetError, PlanError
from fxprune.options import Rule, allow_count, allow_number, allow_words, check_options

FRACTION_OR_COUNT = Rule(
    lambda limit: limit is None or not 1 < limit < 100 or limit % 1 == 0,
    "is neither a fraction nor a count: give 0.5 for a half",
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may remain. Several limits can stand together; all are met, and the tightest is used up.

    A float in (0, 1] is a fraction of what the model costs now; any other number is absolute.

    Attributes:
        flops: FLOPs of a forward pass on the example inputs (a multiply and an add are 2).
        macs: multiply-accumulates, half the FLOPs.
        params: the number of parameters.
        channels: the number of channels of all groups. Or a share for each of several patterns of groups, such as
            ``{"layer4.*": 0.5, "*.attn": 0.75}``: the groups of a pattern keep this share of their channels together,
            and compete for it as ``scope`` says; all other limits are met by the groups that no pattern names.
        memory: bytes of weights and of all values that a forward pass computes.
        layers: the number of residual branches: blocks of a residual network, attentions and MLPs of a transformer. The
            others go whole, those of the lowest scores, before widths meet the other limits.
        latency: of a forward pass, measured; a fraction, seconds above 1, or a ``timedelta``.
        tolerance: how much of a limit may be left unused, as a fraction of it.
    """

    flops: float | None = None
    macs: float | None = None
    params: float | None = None
    channels: float | Mapping[str, float] | None = field(default=None, hash=False)
    memory: float | None = None
    layers: float | None = None
    latency: float | timedelta | None = None
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        limits = {name: value for name, value in vars(self).items() if name != "tolerance"}
        if all(value is None for value in limits.values()):
            raise BudgetError(f"an empty budget: give at least one of {', '.join(limits)}")
        if isinstance(self.latency, timedelta):
            limits["latency"] = self.latency.total_seconds()
        if isinstance(self.channels, Mapping):
            object.__setattr__(self, "channels", dict(self.channels))
            check_shares(self.shares)
            del limits["channels"]
        check_options(limits, BudgetError, **dict.fromkeys(limits, allow_number(above=0).or_none()))
        check_options(limits, BudgetError, **dict.fromkeys(limits.keys() - {"latency"}, FRACTION_OR_COUNT))
        check_options(self, BudgetError, tolerance=allow_number(above=0, below=1))

    @property
    def shares(self) -> dict[str, float]:
        """The channels that the groups of each pattern keep."""
        return dict(self.channels) if isinstance(self.channels, Mapping) else {}

    def limits(self) -> list[tuple[str, float]]:
        """The limits on the whole model that are counted, each with its cost."""
        limits = [(name, getattr(self, name)) for name in ("flops", "macs", "params", "channels", "memory")]
        return [(name, value) for name, value in limits if value is not None and not isinstance(value, Mapping)]

    def __str__(self) -> str:
        """The limits that are set."""
        return ", ".join(f"{name}={value}" for name, value in vars(self).items() if value is not None)


def check_shares(shares: Mapping[str, float]) -> None:
    """Raise BudgetError unless each pattern of ``Budget.channels`` has a share or a count."""
    if not shares or not all(isinstance(pattern, str) for pattern in shares):
        raise BudgetError(f"channels={shares!r:.80} must name groups, such as {{'layer4.*': 0.5}}")
    named = {f"channels[{pattern!r}]": share for pattern, share in shares.items()}
    check_options(named, BudgetError, **dict.fromkeys(named, allow_number(above=0)))
    check_options(named, BudgetError, **dict.fromkeys(named, FRACTION_OR_COUNT))


def is_fraction(value: float) -> bool:
    """Whether a limit is a fraction of what the model costs now."""
    return not isinstance(value, Integral) and 0 < value <= 1


def patterns_of(keep: object) -> tuple[str, ...]:
    """``keep``, one pattern or several, as a tuple."""
    patterns = (keep,) if isinstance(keep, str) else tuple(keep) if isinstance(keep, Sequence) else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise PlanError(f"keep={keep!r:.80} must be a list of names of layers, such as ['layer4.*', 'fc']")
    return patterns


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a plan may do to each group.

    Attributes:
        minimum: the fraction of a group's channels that stay at least.
        maximum: the fraction of a group's channels that stay at most.
        keep: patterns of modules or parameters whose output channels all stay ("layer4.*", "fc"); with an axis
            ("fc.weight[1]") the channels on that axis. A module stands for all that is in it.
        round_to: widths are multiples of this, but for a few groups that use up the rest of the budget; "auto" chooses
            from device and dtype, by a sixteenth of a group at most. A number holds but for a quarter of a group.
        scope: "global" compares scores across all groups, "local" removes the same fraction of each group: exactly the
            same of equally wide ones, where such widths meet the budget. "isomorphic" removes the same fraction of each
            kind of group, and compares scores across the groups of a kind: those that go through the same kinds of
            layers in the same order. After Fang et al., "Isomorphic Pruning for Vision Models" (2024).
    """

    minimum: float = 0.1
    maximum: float = 1.0
    keep: Sequence[str] = ()
    round_to: int | str = "auto"
    scope: str = "global"

    def __post_init__(self) -> None:
        patterns_of(self.keep)
        check_options(
            self,
            PlanError,
            minimum=allow_number(least=0, most=1),
            round_to=allow_count().or_auto(),
            scope=allow_words("global", "local", "isomorphic"),
        )
        check_options(self, PlanError, maximum=allow_number(least=self.minimum, most=1))
