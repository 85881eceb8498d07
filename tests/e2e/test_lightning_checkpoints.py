"""Checkpoints of Lightning's Trainer by PartitaStrategy: kept, rotated, resumed bit for bit, and as plain weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint  # noqa: E402
from lightnings import Net, Partitioned, fitted, loader, trainer_of  # noqa: E402
from partita.checkpoint import CheckpointError  # noqa: E402

slow = pytest.mark.slow


def kept(folder: str, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", monitor="val", save_last=True, **options)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.strategy.release()
    return {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# -- resuming


def _resumes(folder: str, stage: int, make: Any, options: dict[str, Any]) -> None:
    """Three epochs, and two with a third one by another Trainer: dropout, shuffled data, schedules, callbacks."""

    def run(where: str, epochs: int, ckpt_path: str | None = None) -> tuple[Any, Any, Any]:
        watched = [kept(f"{folder}/{where}", save_top_k=2), EarlyStopping("val", patience=9)]
        trainer, model = fitted(
            stage, folder, make, ckpt_path, max_epochs=epochs, callbacks=watched, enable_checkpointing=True, **options
        )
        return trainer, model, watched

    whole, expected, watched = run("whole", 4)
    run("parts", 2)
    trainer, model, rewatched = run("parts", 4, f"{folder}/parts/last.ckpt")
    assert model.losses == expected.losses[len(expected.losses) // 2 :]
    assert model.rates == expected.rates[len(expected.rates) // 2 :] and len(set(expected.rates)) > 1
    assert trainer.global_step == whole.global_step and trainer.strategy is not whole.strategy
    assert rewatched[1].wait_count == watched[1].wait_count and rewatched[1].best_score == watched[1].best_score
    assert {Path(p).name: v for p, v in rewatched[0].best_k_models.items()} == {
        Path(p).name: v for p, v in watched[0].best_k_models.items()
    }
    same(weights(trainer), weights(whole))
    names = {path.name for path in Path(folder, "parts").iterdir() if not path.name.startswith(".lock")}
    assert names == {Path(p).name for p in watched[0].best_k_models} | {"last.ckpt"}  # nothing that was removed


RESUMED: dict[str, tuple[int, int, Any, dict[str, Any]]] = {
    "stage 1": (1, 2, Net, {"accumulate_grad_batches": 2}),
    "stage 3": (3, 2, Partitioned, {"accumulate_grad_batches": 2}),
    "one rank": (2, 1, partial(Net, schedule="epoch"), {}),
    "stage 0, bf16": (0, 2, Net, {"precision": "bf16-true"}),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == "stage 3" else slow) for c in RESUMED])
def test_a_run_that_goes_on_is_the_unbroken_run(ranks, tmp_path, case):
    stage, world, make, options = RESUMED[case]
    ranks(world).run(_resumes, str(tmp_path), stage, make, options)


# -- as weights


def _weights_alone(folder: str) -> None:
    """A Trainer's file of weights, in plain Lightning and by DDP; and the best checkpoint, for a test."""
    watched = kept(folder, save_top_k=1)
    trainer, model = fitted(3, folder, callbacks=[watched], enable_checkpointing=True)
    best = trainer.test(ckpt_path="best", dataloaders=loader(16, 2), verbose=False)
    trainer.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
    saved = weights(trainer)
    plain = Net.load_from_checkpoint(f"{folder}/weights.ckpt", map_location="cpu")
    same(plain.state_dict(), saved)
    assert plain.hparams == model.hparams
    for kind in ("ddp", 1, 3):
        other = trainer_of(kind, folder)
        path = f"{folder}/weights.ckpt" if kind != 1 else watched.best_model_path
        torch.testing.assert_close(other.test(Net(), loader(16, 2), ckpt_path=path, verbose=False), best)
    for path, words in ((f"{folder}/weights.ckpt", "Model.load_from_checkpoint"), (f"{folder}/none.ckpt", "none.ckpt")):
        with pytest.raises(Exception, match=words):
            fitted(1, folder, ckpt_path=path)


def test_weights_go_to_plain_lightning_and_the_best_checkpoint_to_a_test(ranks, tmp_path):
    ranks(2).run(_weights_alone, str(tmp_path))


def _saves_after_fit(folder: str) -> None:
    """The optimizer is gone with the engine: the weights are not."""
    trainer, model = fitted(2, folder)
    trainer.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match=r"weights alone.*ModelCheckpoint\(save_last=True\)"):
        trainer.save_checkpoint(f"{folder}/last.ckpt")
    for name in ("weights", "last"):
        plain = Net.load_from_checkpoint(f"{folder}/{name}.ckpt", map_location="cpu")
        same(plain.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"Model\.load_from_checkpoint"):
        fitted(2, folder, ckpt_path=f"{folder}/last.ckpt")


def test_when_fit_is_over_the_weights_can_be_saved(ranks, tmp_path):
    ranks(1).run(_saves_after_fit, str(tmp_path))


class _Object(Net):
    """With a hyper-parameter that is an object."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"activation": torch.nn.ReLU()})


class _State(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"a": object()}


def _odd_states(folder: str) -> None:
    with pytest.warns(UserWarning, match="no activation of the hyper_parameters"):
        fitted(1, folder, _Object, callbacks=[kept(folder)], enable_checkpointing=True)
    fitted(1, folder, _Object, f"{folder}/last.ckpt", max_epochs=4)
    with pytest.raises(CheckpointError, match="_State"):
        fitted(1, folder, callbacks=[kept(f"{folder}/b"), _State()], enable_checkpointing=True)
    with pytest.raises(ValueError, match="a file system"):
        trainer_of(1, folder).strategy.save_checkpoint({"optimizer_states": []}, "s3://bucket/a.ckpt")


@slow
def test_what_cannot_be_saved_is_named(ranks, tmp_path):
    ranks(1).run(_odd_states, str(tmp_path))
