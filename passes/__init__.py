"""The pruning methods and graph rewrites, one file each."""

from .activation_density import ActivationDensity
from .base import Criterion
from .batch_norm_scale import BatchNormScale
from .gate_channels import GateChannels
from .grow_batch import GrowBatch
from .magnitude import Magnitude
from .prunetrain import PruneTrain
from .random import Random
from .single_shot import SingleShot
from .taylor import Taylor

__all__ = [
    "ActivationDensity",
    "BatchNormScale",
    "Criterion",
    "GateChannels",
    "GrowBatch",
    "Magnitude",
    "PruneTrain",
    "Random",
    "SingleShot",
    "Taylor",
]
