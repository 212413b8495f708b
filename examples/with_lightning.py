"""PruneTrain under Lightning: a callback, and nothing else in the module changes.

About a minute on one CPU core. Checkpoints and the log are left in out/with_lightning/;
`trainer.fit(Classifier(), loader, ckpt_path=...)` goes on from a checkpoint, with a dense module."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from shared import BATCH, accuracy, console, digits, few, say
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import fxprune
from fxprune import passes
from fxprune.training.trainers.lightning import Pruning


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = resnet18(weights=None, num_classes=10)

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)


def main():
    pl.seed_everything(0)
    torch.set_num_threads(1)
    train_set, test_set = digits()
    module = Classifier()
    before = fxprune.cost.params(module.net)
    pruner = passes.PruneTrain(budget=fxprune.Budget(flops=0.5), by=0.6, round_to=16)
    pruning = Pruning("net", test_set[0][:16], [pruner], batch_size=BATCH)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[
            pruning,
            pl.callbacks.ModelCheckpoint("out/with_lightning", filename="last", enable_version_counter=False),
        ],
        enable_model_summary=False,
        enable_progress_bar=console.is_terminal,
        log_every_n_steps=1,
        logger=pl.loggers.CSVLogger("out/with_lightning"),
        max_epochs=few(6, 3),
    )
    trainer.fit(module, DataLoader(TensorDataset(*train_set), BATCH, shuffle=True, drop_last=True))
    console.print(str(pruning.session.log), soft_wrap=True)
    after = fxprune.cost.params(module.net)
    say(f"{before:,} parameters before, {after:,} after; {accuracy(module.net.eval(), test_set):.1%} of the test right")


if __name__ == "__main__":
    main()
