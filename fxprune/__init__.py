"""fxprune: prune neural networks while they train, by rewriting their torch.fx graphs."""

from fxprune.budget import cost
from fxprune.budget.budget import Budget
from fxprune.budget.gradual import gradual_budgets
from fxprune.budget.staircase import staircase
from fxprune.channels.analysis import Analysis, analyze
from fxprune.errors import FxpruneError
from fxprune.files.export import export_onnx
from fxprune.files.initialize import initialize
from fxprune.files.model import load, save
from fxprune.files.stream import cut_weights
from fxprune.graph.trace import trace
from fxprune.graph.traced import TracedModule
from fxprune.ops import register_operator
from fxprune.pipeline import Pipeline
from fxprune.plan import Plan
from fxprune.prune import prune
from fxprune.report.bench import bench
from fxprune.report.summary import summarize
from fxprune.rewrite.param_map import ParamMap
from fxprune.rewrite.restore import Restoration, restore
from fxprune.rewrite.rewrite import rewrite
from fxprune.rewrite.slim import slim
from fxprune.rewrite.state_axes import register_optimizer
from fxprune.rewrite.verify import verify
from fxprune.training.run import TrainingPass
from fxprune.training.session import Session
from fxprune.training.when import WhenItPays

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "Budget",
    "FxpruneError",
    "ParamMap",
    "Pipeline",
    "Plan",
    "Restoration",
    "Session",
    "TracedModule",
    "TrainingPass",
    "WhenItPays",
    "analyze",
    "bench",
    "cost",
    "cut_weights",
    "export_onnx",
    "gradual_budgets",
    "initialize",
    "load",
    "prune",
    "register_operator",
    "register_optimizer",
    "restore",
    "rewrite",
    "save",
    "slim",
    "staircase",
    "summarize",
    "trace",
    "verify",
]
