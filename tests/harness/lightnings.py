"""Lightning's Trainer on the ranks of a pool: a model with dropout, its data, and runs by any strategy."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from partita.integrations.lightning import PartitaStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class OfPool(ClusterEnvironment):
    """The processes are there already, and in one group."""

    creates_processes_externally = True
    main_address, main_port = "localhost", 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    local_rank = global_rank

    def node_rank(self) -> int:
        return 0

    def set_world_size(self, size: int) -> None:
        pass

    set_global_rank = set_world_size


class Net(pl.LightningModule):
    """Two forwards in a training step; `losses` are those of this rank, `rates` the learning rates of its steps."""

    def __init__(self, width: int = 12, schedule: str = "step") -> None:
        super().__init__()
        self.schedule = schedule
        self.save_hyperparameters()
        self.net = self.build()
        self.scale = nn.Parameter(torch.ones(()))
        self.losses: list[float] = []
        self.rates: list[float] = []

    def build(self) -> nn.Sequential | None:
        width = self.hparams["width"]
        return nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y) + 0.1 * self(x / 2).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.losses.append(loss.item())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val", nn.functional.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedulers = torch.optim.lr_scheduler
        if self.schedule == "step":
            schedule = {"scheduler": schedulers.StepLR(optimizer, 2, 0.7), "interval": "step"}
        elif self.schedule == "epoch":
            schedule = {"scheduler": schedulers.CosineAnnealingLR(optimizer, 4), "interval": "epoch"}
        else:
            plateau = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
            schedule = {"scheduler": plateau, "interval": "epoch", "monitor": "val"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Partitioned(Net):
    """Built by `configure_model`."""

    def build(self) -> None:
        return None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = super().build()


class Manual(Net):
    """Runs backwards and steps itself: two backwards for each step, and every schedule's step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for part in (0, 1):
            loss = nn.functional.mse_loss(self(x[part::2]), y[part::2])
            self.manual_backward(loss / 2)
            self.losses.append(loss.item())
        optimizer.step()
        self.lr_schedulers().step()


def loader(n: int, seed: int, *, shuffle: bool = False) -> DataLoader[Any]:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=shuffle)


def strategy_of(kind: int | str, **config: Any) -> DDPStrategy:
    """ "ddp", or a stage."""
    if kind == "ddp":
        return DDPStrategy(cluster_environment=OfPool())
    zero = {"stage": kind, "stage3_param_persistence_threshold": 0}
    return PartitaStrategy({"zero_optimization": zero, **config}, cluster_environment=OfPool())


def trainer_of(kind: int | str | DDPStrategy, folder: str | Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    strategy = kind if isinstance(kind, DDPStrategy) else strategy_of(kind)
    return pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        default_root_dir=str(folder),
        **{**quiet, "enable_checkpointing": False, "max_epochs": 3, "gradient_clip_val": 1.0, **options},
    )


def fitted(
    kind: int | str | DDPStrategy,
    folder: str | Path,
    make: Callable[[], Net] = Net,
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[pl.Trainer, Net]:
    """A trainer after a fit of 5 batches in an epoch, and its model, the same on every call."""
    pl.seed_everything(3, verbose=False)
    model = make()
    trainer = trainer_of(kind, folder, **options)
    batches = 5 * dist.get_world_size() * 4
    trainer.fit(model, loader(batches, 0, shuffle=True), loader(16, 1), ckpt_path=ckpt_path)
    return trainer, model
