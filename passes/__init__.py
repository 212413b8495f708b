"""The pruning methods and graph rewrites, one file each."""

from .base import Criterion
from .before_training.allocator import Allocator
from .before_training.base import BeforeTraining
from .before_training.combined import Combined
from .before_training.erdos_renyi import ErdosRenyi
from .before_training.grasp import GraSP
from .before_training.precrop import PreCrop
from .before_training.single_shot import SingleShot
from .before_training.synflow import SynFlow
from .before_training.uniform import Uniform
from .criteria.activation import Activation
from .criteria.batch_norm_scale import BatchNormScale
from .criteria.best_of import BestOf
from .criteria.fisher import Fisher
from .criteria.geometric_median import GeometricMedian
from .criteria.magnitude import Magnitude
from .criteria.optimal_brain_surgeon import OptimalBrainSurgeon
from .criteria.random import Random
from .criteria.taylor import Taylor
from .rewrites.align import Align
from .rewrites.fold_batchnorm import FoldBatchNorm
from .rewrites.fold_constants import FoldConstants
from .rewrites.gate_channels import GateChannels
from .rewrites.pattern_conv import PatternConv
from .rewrites.remove_branches import RemoveBranches
from .training.activation_density import ActivationDensity
from .training.clicktrain.clicktrain import ClickTrain
from .training.dropback.dropback import DropBack
from .training.grow_batch import GrowBatch
from .training.prunetrain import PruneTrain

__all__ = [
    "Activation",
    "ActivationDensity",
    "Align",
    "Allocator",
    "BatchNormScale",
    "BeforeTraining",
    "BestOf",
    "ClickTrain",
    "Combined",
    "Criterion",
    "DropBack",
    "ErdosRenyi",
    "Fisher",
    "FoldBatchNorm",
    "FoldConstants",
    "GateChannels",
    "GeometricMedian",
    "GraSP",
    "GrowBatch",
    "Magnitude",
    "OptimalBrainSurgeon",
    "PatternConv",
    "PreCrop",
    "PruneTrain",
    "Random",
    "RemoveBranches",
    "SingleShot",
    "SynFlow",
    "Taylor",
    "Uniform",
]
