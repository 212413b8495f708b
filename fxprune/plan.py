"""Plan: for each group of channels, which stay. Plain data: composable, comparable, JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from fxprune.atomic import replace_file
from fxprune.errors import FileError, PlanError

FORMAT = "fxprune plan 1"
LARGEST = 2**48  # channels of a group: what has more is no plan
OPTIONS = ("heads", "groups")  # of ``analyze``


@dataclass(frozen=True)
class Plan:
    """Which channels stay.

    Attributes:
        keep: group name -> the channels that stay, sorted; a group that is not named stays whole. A group inside a
            residual branch may keep none: then the branch goes, all but its constant (a norm's shift, mostly).
        sizes: the size of every group of the model that the plan was made for.
        options: the options of ``analyze`` under which these groups were found.
        dropped: the groups that keep none and whose branch takes its constant along.
        source: where the plan is from: the budget and the scope that it was made for, and the model that the command
            line was given. It changes nothing that the plan does.
        layers: residual branches that go whole, by their names in ``Analysis.layers``.
    """

    keep: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]
    options: Mapping[str, str] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    source: Mapping[str, str] = field(default_factory=dict, compare=False)
    layers: Sequence[str] = ()

    def __post_init__(self) -> None:
        keep: dict[str, tuple[int, ...]] = {}
        for name, kept in self.keep.items():
            size = self.sizes.get(name)
            if size is None:
                raise PlanError(f"the plan keeps channels of group {name!r}, which the model does not have")
            channels = tuple(kept)
            integral = all(issubclass(kind, Integral) for kind in set(map(type, channels)))
            within = not channels or (channels[0] >= 0 and channels[-1] < size)
            if not integral or sorted(set(channels)) != [*channels] or not within:
                raise PlanError(
                    f"the channels kept of group {name!r} must be integers, sorted, distinct and in [0, {size}); "
                    f"got {list(channels[:8])}"
                )
            if len(channels) < size:
                keep[name] = tuple(map(int, channels))
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "sizes", dict(self.sizes))
        object.__setattr__(self, "options", dict(self.options))
        object.__setattr__(self, "source", dict(self.source))
        object.__setattr__(self, "dropped", tuple(sorted(self.dropped)))
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        for name in self.dropped:
            if keep.get(name) != ():
                raise PlanError(f"group {name!r} can't be dropped: the plan must keep none of its channels")

    @property
    def widths(self) -> dict[str, int]:
        """The number of channels of each group after the plan; a group that keeps none is no more."""
        widths = {name: len(self.keep.get(name, range(size))) for name, size in self.sizes.items()}
        return {name: width for name, width in widths.items() if width}

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise PlanError unless the plan was made for a model whose groups have these sizes."""
        if self.sizes == dict(sizes):
            return
        foreign = sorted(set(self.sizes) - set(sizes)) + sorted(set(sizes) - set(self.sizes))
        differ = [name for name in self.sizes if name in sizes and sizes[name] != self.sizes[name]]
        difference = (
            f"group {foreign[0]!r} is in one but not in the other"
            if foreign
            else f"group {differ[0]!r} has {sizes[differ[0]]} channels, the plan expects {self.sizes[differ[0]]}"
        )
        raise PlanError(
            f"this plan was made for another model: {difference}. Make a plan from this model's own analysis."
        )

    def then(self, other: "Plan") -> "Plan":
        """The plan that does this one and then ``other``, a plan for the model that this one leads to.

        That model may have fewer groups: one channel is mostly no group any more, nor is what went with a branch.
        """
        widths = self.widths
        untouched = other.sizes.keys() - other.keep.keys()
        other.check(
            {name: widths.get(name, other.sizes[name]) for name in untouched | widths.keys() & other.sizes.keys()}
        )
        keep: dict[str, Sequence[int]] = dict(self.keep)
        for name, kept in other.keep.items():
            channels = self.keep.get(name, range(self.sizes[name]))
            keep[name] = tuple(channels[channel] for channel in kept)
        return Plan(
            keep, self.sizes, self.options, (*self.dropped, *other.dropped), self.source, (*self.layers, *other.layers)
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data."""
        keep = {name: list(kept) for name, kept in self.keep.items()}
        return {
            "format": FORMAT,
            "keep": keep,
            "sizes": dict(self.sizes),
            "options": {**self.options, **self.source},  # one object in the file
            "dropped": list(self.dropped),
            "layers": list(self.layers),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Plan":
        """The opposite of ``to_json``. Raises FileError on anything else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FileError(f"this is not a plan: expected a JSON object with format {FORMAT!r}")
        parts: list[Any] = [data.get(key, []) for key in ("keep", "sizes", "options", "dropped", "layers")]
        keep, sizes, options, dropped, layers = parts
        sound = (
            isinstance(keep, dict)
            and isinstance(sizes, dict)
            and isinstance(options, dict)
            and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in parts[3:])
            and all(type(size) is int and 0 <= size <= LARGEST for size in sizes.values())
            and all(isinstance(option, str) for option in options.values())
            and all(isinstance(kept, list) and all(type(c) is int for c in kept) for kept in keep.values())
        )
        if not sound:
            raise FileError(
                "this plan is damaged: keep, sizes and options must be objects of integer lists, integers from 0 on "
                "and text, and dropped and layers lists of text"
            )
        try:
            source = {name: value for name, value in options.items() if name not in OPTIONS}
            options = {name: value for name, value in options.items() if name in OPTIONS}
            return cls(keep, sizes, options, dropped, source, layers)
        except PlanError as error:
            raise FileError(f"this plan is damaged: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: whole, or not at all. Raises FileError where nothing can be written."""
        with replace_file(path, "a plan") as partial:
            partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan. Raises FileError on a file that is truncated or no plan."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_json(data)
        except (OSError, ValueError, RecursionError, FileError) as error:
            raise FileError(f"can't read a plan from {path}: {error}") from error

    def __str__(self) -> str:
        lines = [f"plan for {len(self.sizes)} groups, {len(self.keep)} of them cut"]
        width = max((len(name) for name in self.sizes), default=0)
        widths = self.widths
        lines += [f"  {name:{width}}  {size:6} -> {widths.get(name, 0):6}" for name, size in self.sizes.items()]
        lines += [f"  the branch of {name} goes whole" for name in self.layers]
        return "\n".join(lines)
