"""The zoos: small torchvision models of each family, and some of timm, pruned to half their FLOPs, obey the law.

``benchmarks/zoo.py`` runs them all and records them; this is its ``check`` on a third.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import zoo_libraries
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
TIMM = [  # what torchvision has none of
    f"timm:{name}"
    for name in (
        "crossvit_9_240 efficientformer_l1 ghostnet_050 hrnet_w18_small levit_128s mobilevit_xxs "
        "nfnet_l0 res2net50_14w_8s skresnet18 xcit_nano_12_p16_224"
    ).split()
]
LIBRARIES = (  # a dozen kinds of what other libraries have
    *("transformers:bert", "transformers:llama", "transformers:whisper", "transformers:qwen3", "transformers:swin"),
    *("transformers:segformer", "smp:Unet", "monai:SegResNet", "diffusers:UNet2DConditionModel", "open_clip:ViT"),
    *("torch:Transformer", "torch:GRU"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.filterwarnings("ignore")
def test_models_of_other_libraries(name: str) -> None:
    pytest.importorskip(zoo_libraries.LIBRARIES[name.partition(":")[0]][1])
    row = check(name)
    assert not row["regions"], row["why"]
    assert row["dtype"] == "float64"
    assert row["moved"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [*f"{CLASSIFICATION} {OTHERS}".split(), *TIMM])
@pytest.mark.filterwarnings("ignore")  # torch's and torchvision's own, of these models in turn
def test_half_the_flops_and_the_same_function(name: str) -> None:
    row = check(name)  # raises where the law does not hold
    assert 0.49 <= row["flops"] <= 0.5
    assert not row["unknown"]
    assert row["moved"] > 1e-3, "the cut itself must be seen in the outputs"
