"""The pruning methods and graph rewrites, one file each."""

from .activation import Activation
from .activation_density import ActivationDensity
from .align import Align
from .allocator import Allocator
from .base import Criterion
from .batch_norm_scale import BatchNormScale
from .before_training import BeforeTraining
from .clicktrain import ClickTrain
from .dropback import DropBack
from .erdos_renyi import ErdosRenyi
from .fisher import Fisher
from .fold_batchnorm import FoldBatchNorm
from .fold_constants import FoldConstants
from .gate_channels import GateChannels
from .geometric_median import GeometricMedian
from .grow_batch import GrowBatch
from .magnitude import Magnitude
from .pattern_conv import PatternConv
from .precrop import PreCrop
from .prunetrain import PruneTrain
from .random import Random
from .remove_branches import RemoveBranches
from .single_shot import SingleShot
from .taylor import Taylor
from .uniform import Uniform

__all__ = [
    "Activation",
    "ActivationDensity",
    "Align",
    "Allocator",
    "BatchNormScale",
    "BeforeTraining",
    "ClickTrain",
    "Criterion",
    "DropBack",
    "ErdosRenyi",
    "Fisher",
    "FoldBatchNorm",
    "FoldConstants",
    "GateChannels",
    "GeometricMedian",
    "GrowBatch",
    "Magnitude",
    "PatternConv",
    "PreCrop",
    "PruneTrain",
    "Random",
    "RemoveBranches",
    "SingleShot",
    "Taylor",
    "Uniform",
]
