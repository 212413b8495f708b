"""Train on CIFAR-10 with PruneTrain or Activation Density, and the dense model beside it: same weights, same batches,
steps in turns.

    python benchmarks/cifar10.py --data PATH
    python benchmarks/cifar10.py --data PATH --method activation_density
    torchrun --nproc-per-node 2 benchmarks/cifar10.py --data PATH

PATH holds train/<class>/*.jpg and test/<class>/*.jpg, or the CIFAR-10 that torchvision downloads. Run it again after an
interruption and it goes on where it was. The table, picture and ONNX file are left in --out."""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from timeit import timeit

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import CIFAR10, ImageFolder

import fxprune
from fxprune import passes

MEAN, STD = (torch.tensor(each).view(3, 1, 1) for each in ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)))
LAST = torch.channels_last  # the faster layout on a CPU
VGGS = {
    "vgg8": "32 M 64 M 128 128 M 256",
    "vgg8_wide": "64 M 128 M 256 256 M 512",
    "vgg16_bn": "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
}
RESNETS = {"resnet20": 3, "resnet32": 5, "resnet56": 9}  # blocks in each of the three stages
console = Console(highlight=False)
ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # torchrun sets them


def main(arguments=None):
    options = parse(arguments)
    torch.set_flush_denormal(True)  # dying channels go through tiny numbers that a CPU is slow at
    if options.threads:
        torch.set_num_threads(options.threads)
    if ranks > 1:
        dist.init_process_group("gloo")
    options.out.mkdir(parents=True, exist_ok=True)
    console.quiet = rank > 0
    check_options(options)
    train_set, test_set = load_data(options)

    runs = {} if options.no_dense else {"dense": Run("dense", [], options)}
    runs[options.method] = Run(options.method, [METHODS[options.method](options)], options)
    for epoch in range(options.epochs):
        behind = [run for run in runs.values() if run.session.epoch == epoch]  # the others are further
        train_epoch(behind, train_set, options)
        for run in behind:
            run.epoch_end(test_set)
    if rank == 0:
        write_results(runs, options)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def train_epoch(runs, train_set, options):
    """One epoch of all ``runs``. They take turns at every batch, so that a busy machine slows all alike."""
    if not runs:
        return
    for run in runs:
        run.session.model.train()
    for number, (x, y) in enumerate(draw_batches(train_set, options.seed, runs[0].session, options.batch_size)):
        for run in runs if number % 2 else runs[::-1]:
            run.step(x, y)


class Run:
    """A model, its optimizer and its session; a checkpoint after every epoch."""

    def __init__(self, name, passes, options):
        self.name, self.options, self.path = name, options, options.out / f"{name}.ckpt"
        torch.manual_seed(options.seed)  # the same weights for both
        model = build_network(options.model).to(memory_format=LAST)
        optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=5e-4)
        drops = [options.epochs // 2, options.epochs * 3 // 4]
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
        self.clock = Clock()
        wrapped = DistributedDataParallel(model) if ranks > 1 else model
        example = torch.zeros(2, 3, 32, 32)
        if options.resume and self.path.exists():
            self.session = fxprune.Session.load(self.path, wrapped, example, optimizer, progress=False)
            console.print(f"{name}: {self.session.epoch} epochs done before")
        else:
            batch = options.batch_size // ranks
            self.session = fxprune.Session(wrapped, example, optimizer, passes, batch_size=batch, progress=False)
        self.session.register(scheduler=self.scheduler, clock=self.clock)
        self.losses, self.steps = [], []

    def step(self, x, y):
        """One step, timed."""
        session = self.session
        with self.clock:
            session.optimizer.zero_grad()
            loss = F.cross_entropy(session.model(x), y)
            (loss + session.penalty(loss)).backward()
            session.optimizer.step()
            self.losses.append(loss.item())
        self.steps.append(self.clock.last)

    def epoch_end(self, test_set):
        """Test, cut, save."""
        session, losses = self.session, self.losses
        accuracy = measure_accuracy(session.graph, test_set)
        step_time, cpu = (median(times) for times in zip(*self.steps, strict=True))
        with self.clock:
            record = session.epoch_end(step_time=step_time, accuracy=accuracy, cpu_ms=cpu * 1e3)
        self.losses, self.steps = [], []
        self.scheduler.step()
        session.save(self.path)
        loss = sum(losses) / len(losses)
        console.print(
            f"{self.name:10} epoch {record.epoch:3}  loss {loss:.3f}  accuracy {accuracy:.2%}  lr {record.lr:.2g}"
            f"  {record.step_time * 1e3:.1f} ms/step  {record.flops / 1e6:.1f} MFLOPs"
            f"  {sum(record.widths.values())} channels" + (f", {record.removed} cut" if record.removed else ""),
            soft_wrap=True,
        )
        line = {"run": self.name, "loss": loss, **self.clock.state_dict(), **session.log.to_json()[-1]}
        if rank == 0:
            with open(self.options.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


METHODS = {
    "prunetrain": lambda options: passes.PruneTrain(
        ratio=options.ratio,
        interval=options.interval,
        threshold=options.threshold,
        proximal=options.proximal,
        round_to=options.round_to,
    ),
    "activation_density": lambda options: passes.ActivationDensity(
        saturation=options.saturation,
        patience=options.patience,
        cooldown=options.cooldown,
        cuts=options.cuts,
        weights=options.weights,
        round_to=options.round_to,
    ),
}


class Clock:
    """Seconds of training and cutting: on the wall, and of the processor, which other programs disturb less.

    It goes into the checkpoints."""

    wall = cpu = 0.0

    def __enter__(self):
        self.start = time.perf_counter(), time.process_time()

    def __exit__(self, *_):
        self.last = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.wall += self.last[0]
        self.cpu += self.last[1]

    def state_dict(self):
        return {"wall": self.wall, "cpu": self.cpu}

    def load_state_dict(self, state):
        self.wall, self.cpu = state["wall"], state["cpu"]


# ---------------------------------------------------------------------------------------------------------- models


def build_network(name):
    return build_vgg(VGGS[name].split()) if name in VGGS else ResNet(RESNETS[name])


def conv_bn(wide_in, wide_out, stride=1, size=3):
    conv = nn.Conv2d(wide_in, wide_out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(wide_out))


def build_vgg(widths):
    """Convolutions and poolings (M), then the mean over the image and one linear layer."""
    layers, wide = [], 3
    for width in widths:
        layers.append(nn.MaxPool2d(2) if width == "M" else conv_bn(wide, int(width)).append(nn.ReLU()))
        wide = wide if width == "M" else int(width)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10))


class Block(nn.Module):
    def __init__(self, wide_in, wide_out, stride):
        super().__init__()
        self.body = nn.Sequential(conv_bn(wide_in, wide_out, stride), nn.ReLU(), conv_bn(wide_out, wide_out))
        self.shortcut = nn.Identity() if wide_in == wide_out else conv_bn(wide_in, wide_out, stride, size=1)

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """The ResNets for CIFAR: three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks):
        super().__init__()
        self.stem = conv_bn(3, 16).append(nn.ReLU())
        shapes = [(16, 16, 1), *[(16, 16, 1)] * (blocks - 1)]
        for wide in (32, 64):
            shapes += [(wide // 2, wide, 2), *[(wide, wide, 1)] * (blocks - 1)]
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


# ------------------------------------------------------------------------------------------------------------ data


def load_data(options):
    """Training and test set, each (images: uint8[n, 3, 32, 32], labels: int64[n]), decoded once and kept in --out."""
    cache, source = options.out / "images.npz", str(options.data.resolve())
    if rank == 0 and (not cache.exists() or np.load(cache)["source"] != source):
        arrays = {"source": np.array(source)}
        for split in ("train", "test"):
            arrays[f"{split}_x"], arrays[f"{split}_y"] = decode_images(options.data, split)
        np.savez(options.out / "partial.npz", **arrays)
        os.replace(options.out / "partial.npz", cache)
    if ranks > 1:
        dist.barrier()
    arrays = np.load(cache)
    sets = []
    for split in ("train", "test"):
        x, y = (torch.from_numpy(arrays[f"{split}_{axis}"]) for axis in "xy")
        sample = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: options.limit]
        sets.append((x[sample], y[sample]) if options.limit else (x, y))
    return sets


def decode_images(folder, split):
    """Images and labels of one split as arrays."""
    if (folder / split).is_dir():
        images = ImageFolder(folder / split)
        pixels = [np.asarray(image) for image, _ in track(images, f"decode {split}", console=console, transient=True)]
        pixels, labels = np.stack(pixels), images.targets
    else:
        root = folder.parent if folder.name == CIFAR10.base_folder else folder
        images = CIFAR10(root, train=split == "train")
        pixels, labels = images.data, images.targets
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), np.array(labels)


def draw_batches(train_set, seed, session, size):
    """This rank's part of every batch of one epoch, cropped and flipped."""
    images, labels = train_set
    generator = torch.Generator().manual_seed(seed * 1000 + session.epoch)
    order = torch.randperm(len(labels), generator=generator)
    corners = torch.randint(9, (2, len(labels)), generator=generator)
    flips = torch.rand(len(labels), 1, 1, 1, generator=generator) < 0.5
    parts = [part[rank::ranks] for part in order.split(size) if len(part) == size]
    text = f"epoch {session.epoch + 1}"
    for part in track(parts, text, console=console, transient=True, disable=not console.is_terminal):
        padded = F.pad(images[part], (4, 4, 4, 4))
        crops = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # a view: all 9 x 9 crops of each image
        x = crops[torch.arange(len(part)), :, corners[0, part], corners[1, part]]
        yield normalize_images(torch.where(flips[part], x.flip(3), x)), labels[part]


def normalize_images(images):
    return ((images / 255 - MEAN) / STD).contiguous(memory_format=LAST)


@torch.no_grad()
def measure_accuracy(model, test_set):
    """The fraction that the model gets right; each rank tests a part, with the BatchNorm averages of the first."""
    images, labels = (tensor[rank::ranks] for tensor in test_set)
    if ranks > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    parts = zip(images.split(500), labels.split(500), strict=True)
    count = torch.tensor([sum((model(normalize_images(x)).argmax(1) == y).sum() for x, y in parts), len(labels)])
    if ranks > 1:
        dist.all_reduce(count)
    return (count[0] / count[1]).item()


# ---------------------------------------------------------------------------------------------------------- report


def write_results(runs, options):
    """The table, on the screen and as files; the picture; the ONNX file."""
    last = runs[options.method].session
    images = torch.randn(options.batch_size, 3, 32, 32).contiguous(memory_format=LAST)
    logs = [run.session.log for run in runs.values()]
    models = [run.session.graph.eval() for run in runs.values()]
    minutes = [sum(epoch.step_time * epoch.steps for epoch in log) / 60 for log in logs]
    busy = [sum(epoch.values["cpu_ms"] * epoch.steps for epoch in log) / 6e4 for log in logs]
    work = [sum(3 * epoch.flops * epoch.samples * ranks * epoch.steps for epoch in log) / 1e15 for log in logs]
    rows = [
        ("test accuracy", "{:.2%}", [log[-1].values["accuracy"] for log in logs]),
        ("training, minutes: median step x steps", "{:.1f}", minutes),
        ("training, minutes: median processor time of a step x steps", "{:.1f}", busy),
        ("training, minutes: wall, with the cuts", "{:.1f}", [run.clock.wall / 60 for run in runs.values()]),
        ("training, minutes: processor, with the cuts", "{:.1f}", [run.clock.cpu / 60 for run in runs.values()]),
        ("training FLOPs, 1e15: 3 x forward x images", "{:.3f}", work),
        ("parameters at the end", "{:,}", [fxprune.cost.params(model) for model in models]),
        ("forward MFLOPs an image at the end", "{:.1f}", [fxprune.cost.flops(m, images[:1]) / 1e6 for m in models]),
        (f"inference, ms a batch of {len(images)}", "{:.2f}", milliseconds(models, images)),
    ]
    caption = f"{options.model}, {options.epochs} epochs, {ranks} x {torch.get_num_threads()} threads"
    if len(runs) == 2:
        saved = [1 - pruned / dense for dense, pruned in (minutes, busy, work)]
        caption += f"; {saved[0]:.1%} of the training time saved ({saved[1]:.1%} of the processor's)"
        caption += f", {saved[2]:.1%} of its FLOPs"
        caption += f"; time / FLOPs saved: {saved[0] / saved[2]:.2f}" if saved[2] else ""
    names = [*runs, *["ratio"] * (len(runs) == 2)]
    table = Table("", *(Column(name, justify="right") for name in names), box=box.MARKDOWN)
    for label, form, values in rows:
        ratio = [f"{values[1] / values[0]:.2f}" if "accuracy" not in label else ""] if len(runs) == 2 else []
        table.add_row(label, *map(form.format, values), *ratio)
    console.print(table, caption, sep="\n", soft_wrap=True)

    with open(options.out / "results.md", "w") as file:
        Console(file=file, width=120).print(table, caption, sep="\n", soft_wrap=True)
    results = {
        "options": describe_options(options) | {"ranks": ranks, "threads": torch.get_num_threads()},
        "table": {label: dict(zip(runs, values, strict=True)) for label, _, values in rows},
        "epochs": {name: run.session.log.to_json() for name, run in runs.items()},
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    last.log.plot(options.out / f"{options.method}.png")
    console.print(
        str(fxprune.export_onnx(last.graph, images[:2], options.out / f"{options.method}.onnx")), soft_wrap=True
    )


@torch.no_grad()
def milliseconds(models, images):
    """The median time of each model; they take turns, so that a busy machine slows all alike."""
    turns = [[timeit(lambda model=model: model(images), number=1) for model in models] for _ in range(35)]
    return [1e3 * median(seconds) for seconds in zip(*turns[5:], strict=True)]  # the first five are warm-up


# --------------------------------------------------------------------------------------------------------- options


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder of the images")
    add("--out", type=Path, default=Path("out/cifar10"), help="folder for checkpoints and results")
    add("--model", choices=[*VGGS, *RESNETS], default="vgg8")
    add("--epochs", type=int, default=12, help="the learning rate falls to a tenth at 50 %% and at 75 %% of them")
    add("--batch-size", type=int, default=64, help="of all processes together")
    add("--lr", type=float, default=0.1)
    add("--method", choices=METHODS, default="prunetrain")
    add("--round-to", type=int, default=8, help="widths are multiples of this")
    prunetrain = parser.add_argument_group("PruneTrain").add_argument
    prunetrain("--ratio", type=float, default=0.2, help="of the penalty in the loss, at the first batch")
    prunetrain("--interval", type=int, default=1, help="epochs between cuts")
    prunetrain("--threshold", type=float, default=1e-4, help="channels go whose weights are all smaller")
    prunetrain("--proximal", action="store_true", help="shrink the channels after each step, with no penalty")
    density = parser.add_argument_group("Activation Density").add_argument
    density("--saturation", type=float, default=0.01, help="a density that moves less in an epoch has settled")
    density("--patience", type=int, default=3, help="epochs that all densities have settled for before a cut")
    density("--cooldown", type=int, default=5, help="epochs between cuts at least")
    density("--cuts", type=int, default=2, help="at most so many")
    density("--weights", choices=["keep", "reinit"], default="keep", help="after a cut")
    add("--seed", type=int, default=0)
    add("--limit", type=int, help="use only so many images, to try things out")
    add("--threads", type=int, help="CPU threads of each process")
    add("--no-dense", action="store_true", help="the pruned model alone")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from the checkpoints in --out")
    return parser.parse_args(arguments)


def describe_options(options):
    """The options that make a run what it is."""
    ignored = {"data", "out", "resume", "threads", "no_dense"}
    return {name: value for name, value in vars(options).items() if name not in ignored}


def check_options(options):
    """Write the options into --out, or stop if checkpoints there were made with others."""
    path = options.out / "options.json"
    stored = json.loads(path.read_text()) if path.exists() and options.resume else describe_options(options)
    changed = [name for name, value in describe_options(options).items() if stored.get(name) != value]
    if changed:
        raise SystemExit(f"{options.out} has a run with other {', '.join(changed)}: use another --out, or --no-resume")
    if rank == 0:
        path.write_text(json.dumps(describe_options(options), indent=1))


if __name__ == "__main__":
    main()
