"""The models of other libraries, small and with random weights: what ``zoo.py --libraries`` prunes.

Needs the extra ``zoo``. Where ultralytics is installed its detectors are taken too; no extra names it, for its license
(AGPL) is not that of this project.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT |= {"vocab_size": 200, "max_position_embeddings": 64}
DECODER = TEXT | {"use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = DECODER | {"num_key_value_heads": 2}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200, "use_cache": False}
BOTH = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BOTH |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 200}
BOTH |= {"use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
IMAGE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
IMAGE |= {"image_size": 64, "patch_size": 16}
STAGES = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
TINY = {"hidden_sizes": [32, 64], "depths": [2, 2]}
AUDIO = {"conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
AUDIO |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
MOBILE = {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 16, 24, 32, 48, 64, 128], "num_attention_heads": 4}
SEGFORMER = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
SEGFORMER |= {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
SEGFORMER |= {"decoder_hidden_size": 32}
MOE = GROUPED | {"num_local_experts": 4}

TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {  # prefix of the config, task, options, input
    "albert": ("Albert", "ForSequenceClassification", TEXT | {"embedding_size": 32}, "text"),
    "bert": ("Bert", "ForSequenceClassification", TEXT, "text"),
    "deberta_v2": ("DebertaV2", "ForSequenceClassification", TEXT, "text"),
    "distilbert": (
        *("DistilBert", "ForSequenceClassification"),
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 200},
        "text",
    ),
    "electra": ("Electra", "ForSequenceClassification", TEXT | {"embedding_size": 32}, "text"),
    "mpnet": ("MPNet", "ForSequenceClassification", TEXT, "text"),
    "roberta": ("Roberta", "ForSequenceClassification", TEXT, "text"),
    "gpt2": ("GPT2", "LMHeadModel", GPT, "text"),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", DECODER, "text"),
    "gptj": ("GPTJ", "ForCausalLM", GPT | {"rotary_dim": 8}, "text"),
    "bloom": ("Bloom", "ForCausalLM", {**GPT, "hidden_size": 64}, "text"),
    "opt": (
        *("OPT", "ForCausalLM"),
        DECODER | {"ffn_dim": 128, "word_embed_proj_dim": 64},
        "text",
    ),
    "phi": ("Phi", "ForCausalLM", DECODER, "text"),
    "llama": ("Llama", "ForCausalLM", GROUPED, "text"),
    "mistral": ("Mistral", "ForCausalLM", GROUPED, "text"),
    "qwen2": ("Qwen2", "ForCausalLM", GROUPED, "text"),
    "qwen3": ("Qwen3", "ForCausalLM", GROUPED | {"head_dim": 16}, "text"),
    "gemma": ("Gemma", "ForCausalLM", GROUPED | {"head_dim": 16}, "text"),
    "gemma3": ("Gemma3", "ForCausalLM", GROUPED | {"head_dim": 16}, "text"),
    "olmo2": ("Olmo2", "ForCausalLM", GROUPED, "text"),
    "mixtral": ("Mixtral", "ForCausalLM", MOE, "text"),
    "mamba": (
        *("Mamba", "ForCausalLM"),
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 200, "use_cache": False, "state_size": 8},
        "text",
    ),
    "t5": (
        *("T5", "ForConditionalGeneration"),
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 200}
        | {"use_cache": False, "decoder_start_token_id": 0},
        "text to text",
    ),
    "bart": ("Bart", "ForConditionalGeneration", BOTH, "text to text"),
    "pegasus": ("Pegasus", "ForConditionalGeneration", BOTH, "text to text"),
    "whisper": (
        *("Whisper", "ForConditionalGeneration"),
        BOTH | {"num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 32},
        "speech to text",
    ),
    "wav2vec2": ("Wav2Vec2", "ForCTC", TEXT | AUDIO, "speech"),
    "hubert": ("Hubert", "ForCTC", TEXT | AUDIO, "speech"),
    "clip": (
        *("CLIP", "Model"),
        {"text_config": DECODER, "vision_config": IMAGE, "projection_dim": 32},
        "text and image",
    ),
    "beit": ("Beit", "ForImageClassification", IMAGE, "image"),
    "convnext": ("ConvNext", "ForImageClassification", TINY | {"num_stages": 2}, "image"),
    "deit": ("Deit", "ForImageClassification", IMAGE, "image"),
    "dinov2": ("Dinov2", "ForImageClassification", IMAGE | {"mlp_ratio": 2}, "image"),
    "mobilevit": ("MobileViT", "ForImageClassification", MOBILE | {"image_size": 64}, "image"),
    "regnet": ("RegNet", "ForImageClassification", TINY | {"embedding_size": 16, "groups_width": 16}, "image"),
    "resnet": ("ResNet", "ForImageClassification", TINY | {"embedding_size": 16, "layer_type": "basic"}, "image"),
    "segformer": ("Segformer", "ForSemanticSegmentation", SEGFORMER, "image"),
    "swin": ("Swin", "ForImageClassification", STAGES, "image"),
    "swinv2": ("Swinv2", "ForImageClassification", STAGES, "image"),
    "vit": ("ViT", "ForImageClassification", IMAGE, "image"),
    "upernet": ("UperNet", "ForSemanticSegmentation", {"hidden_size": 32, "auxiliary_in_channels": 64}, "image"),
}


def build_transformers(name: str) -> tuple[Any, Any]:
    """A model of transformers (Hugging Face) with a task's head, and its keyword arguments."""
    import torch
    import transformers

    prefix, task, options, kind = TRANSFORMERS[name]
    kinds = {text.lower(): text for text in dir(transformers)}
    config = getattr(transformers, kinds[f"{prefix}{'text' * (name == 'gemma3')}config".lower()])
    if name == "upernet":
        backbone = transformers.ConvNextConfig(
            hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
        )
        options = {**options, "backbone_config": backbone}
    model = getattr(transformers, kinds[f"{prefix}{task}".lower()])(config(**options))
    text, image = torch.randint(3, 200, (2, 16)), torch.randn(2, 3, 64, 64)
    inputs = {
        "text": {"input_ids": text},
        "text to text": {"input_ids": text, "decoder_input_ids": text[:, :8]},
        "image": {"pixel_values": image},
        "text and image": {"input_ids": text, "pixel_values": image},
        "speech": {"input_values": torch.randn(2, 2000)},
        "speech to text": {"input_features": torch.randn(2, 16, 100), "decoder_input_ids": text[:, :8]},
    }
    return model, ((), inputs[kind])


SEGMENTATION = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus Segformer UPerNet".split()


def build_segmentation(name: str) -> tuple[Any, Any]:
    """A model of segmentation_models_pytorch on a ResNet."""
    import segmentation_models_pytorch as smp
    import torch

    return getattr(smp, name)("resnet18", encoder_weights=None, classes=3), torch.randn(2, 3, 128, 128)


MONAI: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "UNETR": (
        {"in_channels": 1, "out_channels": 2, "img_size": (32, 32, 32), "feature_size": 8, "hidden_size": 48}
        | {"mlp_dim": 96, "num_heads": 4},
        (1, 1, 32, 32, 32),
    ),
    "SwinUNETR": ({"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2}, (2, 1, 64, 64)),
    "BasicUNet": (
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": (16, 16, 32, 32, 64, 16)},
        (2, 1, 64, 64),
    ),
    "SegResNet": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "init_filters": 16}, (2, 1, 64, 64)),
}


def build_monai(name: str) -> tuple[Any, Any]:
    """A network of MONAI."""
    import torch
    from monai.networks import nets

    options, shape = MONAI[name]
    return getattr(nets, name)(**options), torch.randn(*shape)


def build_diffusers(name: str) -> tuple[Any, Any]:
    """A network of diffusers, with the noise and the time step."""
    import diffusers
    import torch

    options = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    inputs = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 7])}
    if name == "UNet2DModel":
        options |= {"in_channels": 4, "out_channels": 4, "attention_head_dim": 8}
        options |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        options |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    else:
        options |= {"cross_attention_dim": 32, "attention_head_dim": 4}
        options |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        options |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
        inputs["encoder_hidden_states"] = torch.randn(2, 5, 32)
    return getattr(diffusers, name)(**options), ((), inputs)


def build_torch(name: str) -> tuple[Any, Any]:
    """A transformer of torch.nn between two linear layers, or a recurrent one."""
    import torch
    from torch import nn

    def encoder(**options: Any) -> nn.Module:
        return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)

    def decoder(**options: Any) -> nn.Module:
        return nn.TransformerDecoderLayer(32, 4, 64, batch_first=True, **options)

    makers: dict[str, Callable[[], nn.Module]] = {
        "TransformerEncoderLayer": encoder,
        "TransformerEncoderLayer, norm first": lambda: encoder(norm_first=True),
        "TransformerEncoder": lambda: nn.TransformerEncoder(encoder(), 2),
        "TransformerDecoderLayer": decoder,
        "TransformerDecoder": lambda: nn.TransformerDecoder(decoder(), 2),
        "Transformer": lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
        "MultiheadAttention": lambda: nn.MultiheadAttention(32, 4, batch_first=True),
        "LSTM": lambda: nn.LSTM(32, 32, 2, batch_first=True, bidirectional=True),
        "GRU": lambda: nn.GRU(32, 32, batch_first=True),
    }

    class Net(nn.Module):
        """Both ends are linear layers, so that no width of the part is an input's or output's."""

        def __init__(self) -> None:
            super().__init__()
            self.before, self.part = nn.Linear(16, 32), makers[name]()
            self.after = nn.Linear(64 if name == "LSTM" else 32, 4)

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            result = self.part(*map(self.before, inputs))
            return self.after(result if isinstance(result, torch.Tensor) else result[0])

    one, other = torch.randn(2, 10, 16), torch.randn(2, 7, 16)
    if name == "MultiheadAttention":
        return Net(), (one, one, one)
    return Net(), (one, other) if "Decoder" in name or name == "Transformer" else (one,)


TORCH = (
    *("TransformerEncoderLayer", "TransformerEncoderLayer, norm first", "TransformerEncoder"),
    *("TransformerDecoderLayer", "TransformerDecoder", "Transformer", "MultiheadAttention", "LSTM", "GRU"),
)
TIMM = "tiny_vit_5m_224 mvitv2_tiny efficientvit_b0 efficientvit_m0 levit_128s xcit_nano_12_p16_224 maxvit_nano_rw_256"


def build_timm(name: str) -> tuple[Any, Any]:
    """A model of timm."""
    import timm
    import torch

    model = timm.create_model(name, pretrained=False)
    return model, torch.randn(2, *model.default_cfg["input_size"])


def build_open_clip(name: str) -> tuple[Any, Any]:
    """A small CLIP of open_clip: an image and a text."""
    import torch
    from open_clip.model import CLIP

    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 64}
    if name == "ResNet":
        vision = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 64}
    text = {"context_length": 16, "vocab_size": 200, "width": 64, "heads": 4, "layers": 2}
    model = CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    return model, (torch.randn(2, 3, 64, 64), torch.randint(200, (2, 16)))


def build_ultralytics(name: str) -> tuple[Any, Any]:
    """A detector of ultralytics."""
    import torch
    from ultralytics import YOLO

    return YOLO(f"{name}.yaml").model, torch.randn(2, 3, 128, 128)


LIBRARIES: dict[str, tuple[Callable[[str], tuple[Any, Any]], str, tuple[str, ...]]] = {  # builder, module, names
    "transformers": (build_transformers, "transformers", tuple(TRANSFORMERS)),
    "smp": (build_segmentation, "segmentation_models_pytorch", tuple(SEGMENTATION)),
    "monai": (build_monai, "monai", tuple(MONAI)),
    "diffusers": (build_diffusers, "diffusers", ("UNet2DModel", "UNet2DConditionModel")),
    "torch": (build_torch, "torch", TORCH),
    "timm, again": (build_timm, "timm", tuple(TIMM.split())),
    "open_clip": (build_open_clip, "open_clip", ("ViT", "ResNet")),
    "ultralytics": (build_ultralytics, "ultralytics", ("yolov8n", "yolov8n-seg", "yolo11n", "yolo11n-seg")),
}


def list_models() -> list[str]:
    """The models of the libraries that are installed, as "library:model"."""
    return [
        f"{library}:{name}" for library, (_, module, names) in LIBRARIES.items() if find_spec(module) for name in names
    ]


def build_model(name: str) -> tuple[Any, Any]:
    """A model and its example inputs."""
    library, _, model = name.partition(":")
    return LIBRARIES[library][0](model)
