"""The torchvision zoo: the smallest of each family, pruned to half its FLOPs, obeys the law in eval and train mode.

``benchmarks/zoo.py`` runs all 107 and records them; this is its ``check`` on a third.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from zoo import check

CLASSIFICATION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 "
    "squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_32 wide_resnet50_2"
)
OTHERS = (
    "deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large mc3_18 mvit_v1_b s3d swin3d_t "
    "quantized_googlenet quantized_mobilenet_v2 quantized_mobilenet_v3_large quantized_resnet18 "
    "quantized_shufflenet_v2_x0_5"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", f"{CLASSIFICATION} {OTHERS}".split())
@pytest.mark.filterwarnings("ignore")  # torch's and torchvision's own, of 35 models in turn
def test_half_the_flops_and_the_same_function(name: str) -> None:
    row = check(name)  # raises where the law does not hold
    assert 0.49 <= row["flops"] <= 0.5
    assert not row["unknown"]
    assert row["moved"] > 1e-3, "the cut itself must be seen in the outputs"
