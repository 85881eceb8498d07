"""Lightning's Trainer by PartitaStrategy: the numbers of its DDPStrategy, in every stage, on one and two ranks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pl = pytest.importorskip("lightning.pytorch")
import lightnings  # noqa: E402
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, LearningRateMonitor  # noqa: E402
from lightnings import Manual, Net, Partitioned, fitted, loader, strategy_of, trainer_of  # noqa: E402

slow = pytest.mark.slow


def close(actual: list[float], expected: list[float], *, within: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=within, atol=within)


def numbers(trainer: Any) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


# -- training


def _trains(stages: list[int], folder: str, options: dict[str, Any], schedule: str) -> None:
    def run(kind: Any) -> tuple[Any, Any]:
        return fitted(kind, folder, partial(Net, schedule=schedule), **options)

    reference, expected = run("ddp")
    assert len(set(expected.rates)) > 1
    seen = {}
    for stage in stages:
        trainer, model = run(stage)
        rounding = 1e-5 if options.get("precision") is None else 1e-2
        close(model.losses, expected.losses, within=rounding)
        close(list(numbers(trainer).values()), list(numbers(reference).values()), within=rounding)
        assert model.rates == expected.rates and trainer.global_step == reference.global_step
        seen[stage] = model.losses
    for first, second in ((0, 1), (2, 3)):
        assert first not in seen or second not in seen or seen[first] == seen[second]


CASES: dict[str, tuple[int, list[int], dict[str, Any], str]] = {
    "one rank": (1, [0, 1, 2, 3], {}, "step"),
    "two ranks": (2, [0, 1, 2, 3], {}, "step"),
    "accumulation": (2, [0, 1, 2, 3], {"accumulate_grad_batches": 2}, "step"),  # five batches: the last step has one
    "bf16": (2, [0, 1, 2, 3], {"precision": "bf16-mixed"}, "epoch"),
    "monitored schedule": (1, [1, 3], {"accumulate_grad_batches": 3}, "plateau"),
    "no clipping": (1, [1], {"gradient_clip_val": None}, "epoch"),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == "accumulation" else slow) for c in CASES])
def test_it_trains_as_ddp_does(ranks, tmp_path, case):
    """Losses of each rank and batch, metrics, learning rates and steps."""
    world, stages, options, schedule = CASES[case]
    ranks(world).run(_trains, stages, str(tmp_path), options, schedule)


def _trains_in_16_bits(folder: str) -> None:
    _, plain = fitted("ddp", folder, Partitioned)
    losses = {}
    for name, run in {
        "trainer": lambda: fitted(1, folder, Partitioned, precision="bf16-true"),
        "config": lambda: fitted(strategy_of(1, bf16={"enabled": True}), folder, Partitioned),
        "stage 3": lambda: fitted(3, folder, Partitioned, precision="bf16-true"),
    }.items():
        trainer, model = run()
        assert trainer.precision == "bf16-true" and model.net[0].weight.dtype == torch.bfloat16
        losses[name] = model.losses
    assert losses["trainer"] == losses["config"] == losses["stage 3"] != plain.losses
    close(losses["trainer"], plain.losses, within=0.05)


@slow
def test_a_16_bit_model_is_said_by_the_trainer_or_the_config(ranks, tmp_path):
    ranks(2).run(_trains_in_16_bits, str(tmp_path))


def _builds(folder: str) -> None:
    _, expected = fitted(0, folder, Partitioned)
    trainer, model = fitted(3, folder, Partitioned)
    assert model.losses == expected.losses
    trainer.strategy.release()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_configure_model_builds_it_partitioned_with_the_same_numbers(ranks, tmp_path):
    ranks(2).run(_builds, str(tmp_path))


def _by_hand(folder: str) -> None:
    _, expected = fitted("ddp", folder, Manual, gradient_clip_val=None)
    for stage in (0, 3):
        _, model = fitted(stage, folder, Manual, gradient_clip_val=None)
        close(model.losses, expected.losses)


@slow
def test_a_module_may_run_its_backwards_and_steps_itself(ranks, tmp_path):
    ranks(2).run(_by_hand, str(tmp_path))


# -- what stands around training


def _evaluates(kind: Any, folder: str) -> list[Any]:
    """Of a new model, after training, and once more after further training."""
    pl.seed_everything(3, verbose=False)
    model, trainer = Net(), trainer_of(kind, folder)
    found: list[Any] = [trainer.validate(model, loader(16, 1), verbose=False)[0]["val"]]
    for epochs in (1, 3):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, loader(40, 0), loader(16, 1))
        found.append(trainer.test(model, loader(16, 2), verbose=False)[0]["val"])
        found += torch.cat(trainer.predict(model, loader(16, 2))).flatten().tolist()
    if kind == 3:
        trainer.strategy.release()
    with torch.no_grad():
        return [*found, model(torch.ones(1, 8)).item()]


def _evaluations_agree(folder: str) -> None:
    expected = _evaluates("ddp", folder)
    for stage in (0, 3):
        close(_evaluates(stage, folder), expected)


def test_validation_test_and_prediction_before_between_and_after_two_fits(ranks, tmp_path):
    ranks(2).run(_evaluations_agree, str(tmp_path))


def _callbacks(folder: str) -> None:
    seen = []
    for kind in ("ddp", 2):
        rates = LearningRateMonitor()
        stopping = EarlyStopping("val", patience=1, min_delta=100.0)
        gathers = GradientAccumulationScheduler({0: 1, 1: 2})
        logger = pl.loggers.CSVLogger(folder, name=str(kind))
        trainer, model = fitted(kind, folder, callbacks=[rates, stopping, gathers], logger=logger, log_every_n_steps=1)
        seen.append((model.losses, {**rates.lrs}, trainer.global_step))
        assert trainer.current_epoch == 2 < trainer.max_epochs
    close(seen[1][0], seen[0][0])
    assert seen[1][1:] == seen[0][1:] and len(seen[0][1]) == 1
    if torch.distributed.get_rank() == 0:
        tables = [next(Path(folder, kind).rglob("metrics.csv")).read_text().splitlines() for kind in ("ddp", "2")]
        assert "lr-AdamW" in tables[0][0] and tables[0][0] == tables[1][0] and len(tables[0]) == len(tables[1])


@slow
def test_callbacks_stop_log_the_learning_rate_and_change_the_accumulation(ranks, tmp_path):
    ranks(2).run(_callbacks, str(tmp_path))


# -- what is refused


class _Two(Net):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.scale], 0.1), torch.optim.SGD(self.net.parameters(), 0.1)]


class _TwoByHand(Manual):
    configure_optimizers = _Two.configure_optimizers


class _NoOptimizer(Net):
    def configure_optimizers(self) -> None:
        return None


class _NoLoss(Net):
    def training_step(self, batch: Any, index: int) -> None:
        return None


class _OwnClipping(Net):
    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


REFUSED: dict[str, tuple[type[Net], dict[str, Any], dict[str, Any], str]] = {
    "two optimizers": (_TwoByHand, {}, {"gradient_clip_val": None}, "returned 2 optimizers, and an engine has one"),
    "no optimizer": (_NoOptimizer, {}, {}, 'the config has no "optimizer"'),
    "no loss": (_NoLoss, {}, {}, "return a loss that is zero"),
    "no loss in the middle": (_NoLoss, {}, {"accumulate_grad_batches": 2}, "return a loss that is zero"),
    "clipping by value": (Net, {}, {"gradient_clip_algorithm": "value"}, 'the norm of all gradients together: "norm"'),
    "clipping of its own": (_OwnClipping, {"gradient_clipping": 1.0}, {"gradient_clip_val": None}, "clips at norm 1"),
    "another clipping": (Net, {"gradient_clipping": 2.0}, {}, "gradient_clip_val is 1.0, and the config's"),
    "accumulation": (Net, {"gradient_accumulation_steps": 2}, {}, "accumulate_grad_batches is 1, and the config's"),
    "batch size": (Net, {"train_micro_batch_size_per_gpu": 8}, {}, "the batch size of the data loader is 4"),
    "precision": (Net, {"fp16": {"enabled": True}}, {"precision": "bf16-mixed"}, "'bf16-mixed'), and the config says"),
    "double": (Net, {}, {"precision": "64-true"}, "precision is the engine's"),
    "optimizers": (Net, {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}}, {}, "and the config has an optimizer"),
    "saving": (Net, {"checkpoint": {"dir": "here"}}, {}, "ModelCheckpoint saves"),
    "saving beside": (Net, {"checkpoint": {"async_save": True}}, {}, "ModelCheckpoint removes older checkpoints"),
    "a wrong key": (Net, {"gradient_cliping": 1.0}, {}, "gradient_cliping"),
}


def _refuses(folder: str) -> dict[str, str]:
    said = {}
    for case, (model, config, options, _) in REFUSED.items():
        try:
            fitted(strategy_of(1, **config), folder, model, **options)
        except (ValueError, RuntimeError) as error:
            said[case] = str(error)
    return said


def test_what_cannot_be_done_is_refused_and_says_what_to_do(ranks, tmp_path):
    for said in ranks(2).run(_refuses, str(tmp_path)):
        for case, (*_, words) in REFUSED.items():
            assert words in said.get(case, "nothing was said"), case


def test_the_config_may_be_a_file_and_have_the_optimizer(ranks, tmp_path):
    ranks(2).run(_reads, str(tmp_path))


def _reads(folder: str) -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 0.02}}
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({"optimizer": optimizer, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}))
    strategy = lightnings.PartitaStrategy(path, cluster_environment=lightnings.OfPool())
    trainer, model = fitted(strategy, folder, _NoOptimizer)
    assert model.losses[-1] < model.losses[0] and set(model.rates) == {0.02}
    assert trainer.precision == "32-true" and trainer.precision_plugin.clips_at == 1.0
