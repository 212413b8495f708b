"""fxprune: prune neural networks while they train, by rewriting their torch.fx graphs."""

from fxprune import cost
from fxprune.bench import bench
from fxprune.budget import Budget
from fxprune.channels.analysis import Analysis, analyze
from fxprune.channels.custom import register_operator
from fxprune.errors import FxpruneError
from fxprune.export import export_onnx
from fxprune.files import load, save
from fxprune.initialize import initialize
from fxprune.param_map import ParamMap
from fxprune.pipeline import Pipeline
from fxprune.plan import Plan
from fxprune.prune import prune
from fxprune.rewrite import rewrite
from fxprune.session import Session
from fxprune.staircase import staircase
from fxprune.summary import summarize
from fxprune.trace import trace
from fxprune.traced import TracedModule
from fxprune.training import TrainingPass
from fxprune.verify import verify
from fxprune.when import WhenItPays

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "Budget",
    "FxpruneError",
    "ParamMap",
    "Pipeline",
    "Plan",
    "Session",
    "TracedModule",
    "TrainingPass",
    "WhenItPays",
    "analyze",
    "bench",
    "cost",
    "export_onnx",
    "initialize",
    "load",
    "prune",
    "register_operator",
    "rewrite",
    "save",
    "staircase",
    "summarize",
    "trace",
    "verify",
]
