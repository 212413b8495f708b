"""The errors that fxprune raises. Each message says what was asked, what was found, where, and what to do."""


class FxpruneError(Exception):
    """The base of every error raised by fxprune."""


def require_type(value: object, kind: type | tuple[type, ...], name: str, error: type[FxpruneError]) -> None:
    """Raise ``error`` unless ``value``, which the user gave for the option ``name``, is a ``kind``."""
    if isinstance(value, kind):
        return
    kinds = " or ".join(choice.__name__ for choice in (kind if isinstance(kind, tuple) else (kind,)))
    hint = f"the class {value.__name__}; make an instance" if isinstance(value, type) else type(value).__name__
    raise error(f"{name} must be a {kinds}, but it is {value!r:.60} ({hint})")


class TraceError(FxpruneError):
    """The model can't be recorded, or its graph would not be the model; names the module, file and line."""


class AnalysisError(FxpruneError):
    """The model can't be run on channel names; names the graph node and the user's line."""


class PlanError(FxpruneError):
    """A plan is malformed, empties a layer, or was made for another model."""


class InitializeError(FxpruneError):
    """A model can't be given start values from a seed, or does not have those that it should."""


class BudgetError(FxpruneError):
    """A budget is malformed or out of reach; names the nearest value that can be reached."""


class RewriteError(FxpruneError):
    """A compact graph can't be made or does not have the predicted shapes. The model is unchanged."""


class VerificationError(FxpruneError):
    """The compact model is not the masked original; names the output or gradient that differs, and by how much."""


class RestoreError(FxpruneError):
    """A compact model can't be restored from the original on this data. It is unchanged."""


class MigrationError(FxpruneError):
    """An optimizer's state can't be carried over. The optimizer is unchanged."""


class ExportError(FxpruneError):
    """The ONNX export failed, or its result differs from PyTorch's."""


class FileError(FxpruneError):
    """A file is truncated, foreign, or does not belong to the model. Nothing is changed."""


class PassError(FxpruneError):
    """A rewrite pass failed or broke the graph; names the pass and those that ran before it."""


class SessionError(FxpruneError):
    """A training session was set up or called wrongly, or its ranks disagree. The run is unchanged."""


class BenchError(FxpruneError):
    """Models can't be measured beside each other."""
