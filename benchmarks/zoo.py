"""Every torchvision model: pruned to half its FLOPs, the law checked, exported to ONNX.

    python benchmarks/zoo.py                     all models, each in a process of its own
    python benchmarks/zoo.py --timm              small models of the families of timm instead
    python benchmarks/zoo.py --libraries         those of zoo_libraries.py: Hugging Face, smp, MONAI, diffusers …
    python benchmarks/zoo.py --models resnet18   some
    python benchmarks/zoo.py --onnx              their ONNX parity too
    python benchmarks/zoo.py --analyses          analyse anew, without checking the law

Appends a line a model to results/zoo.jsonl (zoo_timm.jsonl, zoo_libraries.jsonl), skips what is there, and writes
results/zoo.md.
"""

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import zoo_libraries

RESULTS = Path(__file__).parent / "results"
BIG = 150_000_000  # parameters from which the law is checked in float32, outputs only
SINGLE = {"keypointrcnn_resnet50_fpn"}  # takes float32 targets only

TIMM = (  # small ones of its families, that train on a CPU in seconds
    "beit_base_patch16_224 cait_xxs24_224 coat_lite_tiny coatnet_pico_rw_224 convit_tiny convmixer_768_32 "
    "convnext_atto convnextv2_atto crossvit_9_240 cs3darknet_s davit_tiny deit_tiny_patch16_224 densenet121 dla34 "
    "dla46_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientvit_b0 "
    "efficientvit_m0 ese_vovnet19b_dw eva02_tiny_patch14_224 fastvit_t8 fbnetc_100 focalnet_tiny_srf gcvit_xxtiny "
    "gernet_s ghostnet_050 gmixer_12_224 gmlp_ti16_224 halonet26t hardcorenas_a hgnet_tiny hiera_tiny_224 "
    "hrnet_w18_small inception_next_tiny inception_resnet_v2 lambda_resnet26t lcnet_035 levit_128s mambaout_femto "
    "maxvit_rmlp_pico_rw_256 mixer_s32_224 mixnet_s mnasnet_050 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs "
    "mobilevitv2_050 mvitv2_tiny nasnetalarge nest_tiny nf_regnet_b0 nfnet_l0 pit_ti_224 poolformer_s12 pvt_v2_b0 "
    "rdnet_tiny regnetx_002 regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s res2next50 "
    "resmlp_12_224 resnest14d resnet18 resnetv2_50 rexnet_100 selecsls42b sequencer2d_s seresnet18 shvit_s1 "
    "skresnet18 starnet_s1 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 "
    "tresnet_m twins_pcpvt_small vgg11 visformer_tiny vit_tiny_patch16_224 volo_d1_224 vovnet39a xception41 "
    "xcit_nano_12_p16_224"
)


def kind_of(name: str) -> str:
    """Where a model comes from."""
    library, _, rest = name.partition(":")
    return library if rest else names()[name]


def names() -> dict[str, str]:
    """torchvision's builders with their kind: 80 + 6 + 9 + 12 that are one graph, 12 + 2 that plain Python steers."""
    from torchvision import models

    kinds = {
        "classification": models,
        "segmentation": models.segmentation,
        "video": models.video,
        "quantizable": models.quantization,
        "detection": models.detection,
        "optical_flow": models.optical_flow,
    }
    return {name: kind for kind, module in kinds.items() for name in models.list_models(module=module)}


def build(name: str) -> Any:
    """A model of torchvision or timm."""
    return from_timm(name) if kind_of(name) == "timm" else from_torchvision(name)


def randomise(model: Any) -> None:
    """Give norms, biases and scales other values than their initial ones."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim <= 1 or "layer_scale" in parameter_name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
                parameter.mul_(torch.where(torch.rand(parameter.shape, generator=generator) < 0.3, -1.0, 1.0))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif buffer_name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and not module.weight.any():
                module.weight.normal_(0, 0.02, generator=generator)


def from_timm(name: str) -> Any:
    """A model of timm."""
    import timm

    return timm.create_model(name.removeprefix("timm:"), pretrained=False)


def from_torchvision(name: str) -> Any:
    """A model of torchvision, with small images for detectors."""
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    kind = kind_of(name)
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if kind == "detection" and not name.startswith("ssd"):
        options |= {"min_size": 96, "max_size": 128}
    if "rcnn" in name:
        options |= {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 10}
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if kind == "quantizable":
        options["quantize"] = False
    return models.get_model(name, **options)


def example(name: str, model: Any) -> Any:
    """An input, as small as the model allows."""
    import torch

    torch.manual_seed(1)
    kind = kind_of(name)
    if kind == "timm":
        x = torch.randn(2, 3, 96, 96)
        return x if runs(model, x) else torch.randn(2, *model.default_cfg["input_size"])
    if kind == "optical_flow":
        return torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128)
    if kind == "detection":
        return [torch.rand(3, 96, 128), torch.rand(3, 100, 90)], [target(name, 96, 128), target(name, 100, 90)]
    if kind == "video":
        large = name == "s3d" or "mvit" in name
        return torch.randn(1, 3, 16, 224, 224) if large else torch.randn(2, 3, 8, 64, 64)
    if "inception" in name:
        return torch.randn(2, 3, 299, 299)
    if name.startswith(("vit", "maxvit")):
        return torch.randn(2, 3, 518 if name == "vit_h_14_518" else 224, 224)
    return torch.randn(2, 3, 96, 96)


def made(name: str) -> tuple[Any, Any]:
    """A model with random weights, and its input."""
    import torch

    torch.manual_seed(0)
    if kind_of(name) in zoo_libraries.LIBRARIES:
        model, x = zoo_libraries.build_model(name)
    else:
        model = build(name)
        x = example(name, model)
    randomise(model)
    return model, x


def runs(model: Any, x: Any) -> bool:
    """Whether a model takes ``x``: some are made for one size."""
    try:
        copy.deepcopy(model).eval()(x)
    except (AssertionError, RuntimeError):
        return False
    return True


def target(name: str, height: int, width: int) -> dict[str, Any]:
    """Two objects in an image, as detectors train on them."""
    import torch

    objects = {"boxes": torch.tensor([[5.0, 5, 60, 70], [20, 30, 80, 85]]), "labels": torch.tensor([1, 1])}
    if "mask" in name:
        objects["masks"] = (torch.rand(2, height, width) > 0.5).to(torch.uint8)
    if "keypoint" in name:
        objects["keypoints"] = torch.cat([torch.rand(2, 17, 2) * 60 + 10, torch.ones(2, 17, 1)], -1)
    return objects


def parity(name: str) -> float:
    """The difference between onnxruntime and PyTorch for a model pruned to half its FLOPs, in eval mode."""
    import torch

    import fxprune
    from fxprune import passes

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, x = made(name)
    if kind_of(name) == "detection":  # averages that fit nothing make all scores equal, and any choice of boxes right
        for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            model(*x)
        x = x[:1]
    compact = fxprune.prune(model, x, passes.Magnitude(), budget=fxprune.Budget(flops=0.5), verify=False)
    with tempfile.TemporaryDirectory() as folder:
        return fxprune.export_onnx(compact, x, Path(folder) / "model.onnx").difference


def analysed(model: Any, x: Any) -> tuple[Any, dict[str, Any]]:
    """The analysis of one model, and what the table says of it."""
    import torch

    import fxprune
    from fxprune.graph.traced import regions_of

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.process_time()
    graph = fxprune.trace(model, x)
    traced = time.process_time()
    analysis = fxprune.analyze(graph, x)
    end = time.process_time()
    axes = [axis for axis in analysis.axes.values() if not axis.weak and axis.axis == 0]
    rows = {(axis.parameter, 0) for axis in axes}
    reasons = Counter[str]()
    for item in analysis.frozen:
        if (item.parameter, item.axis) in rows:
            reasons[item.reason.text] += len(item.index)
    return analysis, {
        "graphs": sum(len(region.distinct_graphs()) for region in regions_of(graph).values()),
        "regions": [path for path in regions_of(graph) if path],
        "groups": len(analysis.groups),
        "channels": sum(analysis.sizes.values()),
        "inexact": sum(group.size for group in analysis.groups.values() if group.inexact),
        "frozen": reasons.total() / max(1, sum(axis.size for axis in axes)),
        "reasons": dict(reasons.most_common(4)),
        "unknown": sorted(analysis.unknown),
        "trace_s": traced - start,
        "analyze_s": end - traced,
    }


def check(name: str) -> dict[str, Any]:
    """Prune one model and check everything that is promised."""
    import torch

    import fxprune
    from fxprune import cost, passes
    from fxprune.errors import VerificationError
    from fxprune.rewrite.verify import mask_removed

    model, x = made(name)
    big = cost.params(model) > BIG or name in SINGLE
    analysis, row = analysed(model, x)
    graph = analysis.graph
    # At random: a good choice hardly moves the outputs, and the proof would show little.
    plan = passes.Random().plan(analysis, fxprune.Budget(flops=0.5))
    compact, param_map = fxprune.rewrite(graph, analysis, plan)
    dtype = torch.float32 if big else torch.float64
    try:
        result = fxprune.verify(graph, compact, param_map, x, dtype=dtype, gradients=not big)
    except VerificationError:
        if kind_of(name) not in zoo_libraries.LIBRARIES:
            raise
        dtype = torch.float32  # its own Python computes in float32, whatever it is given
        result = fxprune.verify(graph, compact, param_map, x, dtype=dtype)
    graph.eval(), compact.eval()
    dense = graph
    if not isinstance(graph, fxprune.TracedModule):  # what boxes there are depends on the weights: count on the same
        dense = copy.deepcopy(graph)
        mask_removed(dense, param_map)
    return row | {
        "model": name,
        "kind": kind_of(name),
        "flops": cost.flops(compact, x) / cost.flops(dense, x),
        "params": cost.params(compact) / cost.params(graph),
        "dtype": str(dtype).removeprefix("torch."),
        "outputs": result.outputs,
        "gradients": None if big else result.gradients,
        "trained": result.trained,
        "moved": result.moved,
        "onnx": None,
        **(use(name, model, compact, x) if kind_of(name) in zoo_libraries.LIBRARIES else {}),
    }


def without_folders(text: str) -> str:
    """A message without the folders in which packages lie here."""
    return re.sub(r"/[^ :`]*/site-packages/", "", text)


def use(name: str, model: Any, compact: Any, x: Any) -> dict[str, Any]:
    """Train a compact model for a step, and run it on another batch; say why the model is no one graph."""
    import torch

    from fxprune.errors import TraceError
    from fxprune.graph.batch import with_other_sizes
    from fxprune.graph.inputs import bind_inputs, map_tensors, tensors_in
    from fxprune.graph.trace import trace_whole

    args, kwargs = bind_inputs(x)
    optimizer = torch.optim.SGD(compact.parameters(), 1e-3)
    losses = [tensor.float().square().mean() for tensor in tensors_in(compact.train()(*args, **kwargs))]
    sum(loss for loss in losses if loss.requires_grad).backward()
    optimizer.step()
    larger = with_other_sizes((args, kwargs), ())
    pairs = zip(tensors_in((args, kwargs)), tensors_in(larger), strict=True)
    more = iter([torch.cat([a, a[:1]]) if a.shape != b.shape else a for a, b in pairs])
    args, kwargs = map_tensors(lambda _: next(more), larger)
    with torch.no_grad():
        compact.eval()(*args, **kwargs)
    try:
        trace_whole(model, bind_inputs(x))
    except TraceError as error:
        return {"why": without_folders(str(error))}
    return {"why": ""}


def report(rows: list[dict[str, Any]], title: str) -> str:
    """The table, as Markdown."""
    lines = [
        f"# {title}",
        "",
        "Each is pruned to half its FLOPs by a random plan, with random weights and",
        "randomised norms. `law` is the largest difference between the masked original and the compact model,",
        "outputs and gradients, eval and train, relative to the largest value (allowed: 1e-10 in float64,",
        "1e-5 in float32). `onnx` is that between onnxruntime and PyTorch in float32. `frozen` is the share",
        "of weight rows that can't go, with the reasons of most of them. `moved` is how far the cut itself moved",
        "the outputs; `CPU s` is the time of trace and analyze. `graph` counts the graphs of the model, one for",
        "each mode where these differ; where plain Python steers it, those of its regions.",
        "Detectors work on boxes that depend on their weights: the budget is met for the boxes of the example, and",
        "the FLOPs of both models are counted for those of the masked original.",
        "",
        "| model | graph | groups | channels | frozen | FLOPs | params | law | moved | onnx | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["kind"], row["model"])):
        if "error" in row:
            lines.append(f"| {row['model']} | {row['error'][:200]} |")
            continue
        law = max(row["outputs"], row["gradients"] or 0)
        note = " (f32)" if row["dtype"] == "float32" else ""
        parts = f"{len(row['regions'])} regions" if row.get("regions") else str(row["graphs"])
        why = ", ".join(reason for reason in row.get("reasons", ()) if row["frozen"] >= 0.005)
        onnx = f"{row['onnx']:.0e}" if isinstance(row["onnx"], float) else "error" if row["onnx"] else ""
        lines.append(
            f"| {row['model']} | {parts} | {row['groups']} | {row['channels']} | {row['frozen']:.1%} {why} | "
            f"{row['flops']:.1%} | {row['params']:.1%} | {law:.0e}{note} | {row['moved']:.2f} | {onnx} | "
            f"{row['trace_s'] + row['analyze_s']:.2f} |"
        )
    good = [row for row in rows if "error" not in row]
    unknown = sorted({operator for row in good for operator in row["unknown"]})
    lines += [
        "",
        f"{len(good)} of {len(rows)} models pass. Operators without a rule: {', '.join(unknown) or 'none'}. "
        f"ONNX equal for {sum(isinstance(row['onnx'], float) for row in good)}.",
    ]
    return "\n".join(lines) + "\n"


def one(name: str, onnx: bool, limit: float) -> Any:
    """Check one model, or its ONNX parity, in a process of its own. Returns what was found, or an error."""
    command = [sys.executable, __file__, "--one", name, *(["--onnx"] if onnx else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"over {limit:.0f} s"}
    if done.returncode:
        return {"error": without_folders((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Check the models that are not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="", help="comma-separated; default all")
    parser.add_argument("--timm", action="store_true", help="the models of timm (pip install timm)")
    parser.add_argument("--libraries", action="store_true", help="the models of other libraries (the extra zoo)")
    parser.add_argument("--onnx", action="store_true", help="compare onnxruntime with PyTorch too")
    parser.add_argument("--analyses", action="store_true", help="analyse anew what is in the results")
    parser.add_argument("--limit-s", type=float, default=1200)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(parity(options.one) if options.onnx else check(options.one)))
        return
    RESULTS.mkdir(exist_ok=True)
    if options.libraries:
        every, title = zoo_libraries.list_models(), "Other libraries, small models"
        path = RESULTS / "zoo_libraries.jsonl"
    elif options.timm:
        every, title = (
            [f"timm:{name}" for name in TIMM.split()],
            f"timm {version('timm')}, small models of its families",
        )
        path = RESULTS / "zoo_timm.jsonl"
    else:
        every, title, path = list(names()), "torchvision, every model", RESULTS / "zoo.jsonl"
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = {row["model"]: row for row in earlier if "error" not in row}
    for name in options.models.split(",") if options.models else every:
        if name in rows and options.analyses:
            rows[name] |= analysed(*made(name))[1]
            print(name, "analysed", file=sys.stderr, flush=True)
        if name not in rows:
            rows[name] = {"model": name, "kind": kind_of(name), **one(name, False, options.limit_s)}
            print(name, rows[name].get("error", "passes"), file=sys.stderr, flush=True)
        if options.onnx and "error" not in rows[name] and not isinstance(rows[name]["onnx"], float):
            rows[name]["onnx"] = one(name, True, options.limit_s)
            print(name, "onnx", rows[name]["onnx"], file=sys.stderr, flush=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    path.with_suffix(".md").write_text(report(list(rows.values()), title))
    print(report(list(rows.values()), title))


if __name__ == "__main__":
    main()
