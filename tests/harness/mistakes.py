"""What people get wrong on two ranks: what is written, and the words that the end of the job's output must have."""

from __future__ import annotations

from dataclasses import dataclass

# Every mistake comes after this.
PRELUDE = """
import os, tempfile
import torch, partita
from torch import nn

partita.init_distributed()
rank = torch.distributed.get_rank()
CONFIG = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}, "steps_per_print": 0}
batch = torch.randn(2, 4)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 1)

    def predict(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x):
        return self.predict(x).float().pow(2).mean()

class Predictor(Model):
    def forward(self, x):
        return self.predict(x)

def start(model=None, **changes):
    return partita.initialize(model=model or Model(), config={**CONFIG, **changes})[0]

def train(engine):
    engine.backward(engine(batch))
    engine.step()
"""


@dataclass(frozen=True)
class Mistake:
    """Code, and words of which each is in the last ten lines; a rank that goes on has None of them to say."""

    code: str
    words: tuple[str, ...]


def says(code: str, *words: str) -> Mistake:
    return Mistake(code, words)


CONFIGS: dict[str, Mistake] = {
    "a key misspelt": says("start(train_batchsize=4)", "train_batchsize", "'train_batch_size'"),
    "a nested key misspelt": says(
        "start(zero_optimization={'reduce_bucket_sise': 1})",
        "zero_optimization.reduce_bucket_sise",
        "'reduce_bucket_size'",
    ),
    "a key in the wrong section": says("start(stage=2)", "stage", "'zero_optimization.stage'"),
    "a stage that is none": says("start(zero_optimization={'stage': 7})", "zero_optimization.stage = 7", "3"),
    "text for a number": says("start(gradient_clipping='much')", "gradient_clipping = 'much'", "number"),
    "several at once": says("start(a=1, bf16={'enabled': 3})", "2 problems", "bf16.enabled", "a: "),
    "batch sizes that contradict": says(
        "start(train_batch_size=5, gradient_accumulation_steps=2)",
        "train_batch_size = 5",
        "train_micro_batch_size_per_gpu = 2",
        "gradient_accumulation_steps = 2",
        "2 x 2 x 2 = 8",
    ),
    "a batch size that does not divide": says(
        "start(train_batch_size=5)", "train_batch_size = 5", "train_micro_batch_size_per_gpu = 2", "4 or 8"
    ),
    "fp16 and bf16": says("start(fp16={'enabled': True}, bf16={'enabled': True})", "fp16", "bf16", "enabled"),
    "split masters without bf16": says(
        "start(bf16={'master_weights': 'split'})", "bf16", "master_weights", "split", "enabled"
    ),
    "an optimizer misspelt": says("start(optimizer={'type': 'AdmW'})", "optimizer.type", "AdmW", "'AdamW'"),
    "an argument of the optimizer misspelt": says(
        "start(optimizer={'type': 'AdamW', 'params': {'weight_decy': 0}})", "optimizer.params", "'weight_decay'"
    ),
    "a negative learning rate": says(
        "start(optimizer={'type': 'AdamW', 'params': {'lr': -1}})", "optimizer.params.lr = -1", "a number >= 0"
    ),
    "a schedule misspelt": says("start(scheduler={'type': 'WarmupLRR'})", "scheduler", "WarmupLRR", "WarmupLR"),
    "an argument of the schedule misspelt": says(
        "start(scheduler={'type': 'WarmupLR', 'params': {'warmup_steps': 3}})", "scheduler", "warmup_steps"
    ),
    "a schedule and no optimizer": says(
        "start(optimizer=None, scheduler={'type': 'WarmupLR'})", "scheduler", "WarmupLR", "needs an optimizer"
    ),
    "true for a section": says("start(bf16=True)", "bf16 = True", '"bf16": {"enabled": true}'),
    "a number for a section": says("start(zero_optimization=2)", "zero_optimization = 2", '{"stage": 2}'),
    "a name for a section": says("start(optimizer='AdamW')", "optimizer = 'AdamW'", '{"type": "AdamW"'),
    "Adam with a weight decay": says(
        "start(optimizer={'type': 'Adam', 'params': {'weight_decay': 0.1}})",
        "optimizer.params.weight_decay = 0.1",
        'write type "AdamW"',
        '"adam_w_mode": false',
    ),
    "an optimizer that needs matrices": says("start(optimizer={'type': 'Muon'})", "optimizer.type", "use AdamW"),
    "a section that changes the model": says(
        "start(sparse_attention={'mode': 'fixed'})", "sparse_attention", "use an attention", "remove it"
    ),
    "a file that is no JSON": says(
        "path = tempfile.mkdtemp() + '/ds.json'; open(path, 'w').write('{\"a\": 1,,}')\n"
        "partita.initialize(model=Model(), config=path)",
        "ds.json: not valid JSON at line 1, column 10",
    ),
    "a file that is not there": says(
        "partita.initialize(model=Model(), config='/nowhere/ds_config.json')", "/nowhere/ds_config.json"
    ),
    "a config that is none": says("partita.initialize(model=Model(), config=3)", "int", "dict"),
}

CALLS: dict[str, Mistake] = {
    "no model": says("partita.initialize(model=None, config=CONFIG)", "has no model", "give model="),
    "a class for the model": says(
        "partita.initialize(model=Model, config=CONFIG)", "Model is a class", "make a model from it: Model(...)"
    ),
    "the config in second place": says("partita.initialize(Model(), CONFIG)", "a config goes to config="),
    "a model in DistributedDataParallel": says(
        "start(nn.parallel.DistributedDataParallel(Model()))", "DistributedDataParallel", "give the model itself"
    ),
    "a model in DataParallel": says("start(nn.DataParallel(Model()))", "DataParallel", "one process for each GPU"),
    "a model of DTensors": says(
        "from torch.distributed.fsdp import fully_shard\nmodel = Model(); fully_shard(model); start(model)",
        "without fully_shard()",
        "ZeRO stage 3",
    ),
    "the optimizer's name for an optimizer": says(
        "partita.initialize(model=Model(), optimizer='AdamW', config=CONFIG)", "optimizer: a str", "in the config"
    ),
    "fewer samples than a batch": says(
        "data = torch.utils.data.TensorDataset(torch.randn(1, 4))\n"
        "partita.initialize(model=Model(), training_data=data, config=CONFIG)[2].next_batch()",
        "the dataset has 1 samples",
        "2 ranks x train_micro_batch_size_per_gpu 2",
        "lower train_micro_batch_size_per_gpu",
    ),
    "no_sync() in stage 2": says(
        "e = start(zero_optimization={'stage': 2})\nwith e.no_sync():\n    train(e)",
        "no_sync()",
        "stage 2",
        "use stage 0 or 1, or gradient_accumulation_steps",
    ),
    "a loop that ends within a step": says(
        "e = start(gradient_accumulation_steps=2); train(e); e.destroy()",
        "gradient_accumulation_steps",
        "give each step all its micro-batches",
    ),
    "step() inside no_sync()": says(
        "e = start()\nwith e.no_sync():\n    train(e)",
        "engine.step() was called inside engine.no_sync()",
        "after the block",
    ),
    "training under no_grad": says(
        "e = start()\nwith torch.no_grad():\n    loss = e(batch)\ne.backward(loss)",
        "no_grad()",
        "loss = engine(batch) with gradients",
    ),
    "gradients dropped too late": says(
        "e = start(gradient_accumulation_steps=2); train(e); e.backward(e(batch)); e.optimizer.zero_grad(); e.step()",
        "the gradient of parameter",
        "engine.zero_grad()",
    ),
    "gradients read by hand": says(
        "e = start(); e.backward(e(batch)); print(next(e.module.parameters()).grad.abs().max())",
        "the engine has taken it",
        "safe_get_full_grad(parameter)",
    ),
    "clip_grad_norm_()": says(
        "e = start(); e.backward(e(batch)); nn.utils.clip_grad_norm_(e.module.parameters(), 1.0)",
        "'first.weight' was clipped or read by hand",
        "use gradient_clipping in the config",
    ),
    "zero_grad() in every micro-batch": says(
        "e = start(gradient_accumulation_steps=2)\nfor _ in range(4):\n    e.zero_grad(); train(e)",
        "engine.zero_grad() drops the gradients of finished micro-batches",
        "call optimizer.zero_grad() there, or nothing",
    ),
    "step() without backward": says(
        "e = start(); e(batch); e.step()", "engine.step()", "call engine.backward(loss) before step()"
    ),
    "loss.item()": says("e = start(); e.backward(e(batch).item())", "not a float", "call engine.backward(loss)"),
    "a loss that is no scalar": says(
        "e = start(Predictor()); e.backward(e(batch))", "shape (2, 1)", ".mean() or .sum()"
    ),
    "a detached loss": says("e = start(); e.backward(e(batch).detach())", "detached", "engine.backward()"),
    "optimizer.step()": says(
        "e, optimizer, *_ = partita.initialize(model=Model(), config=CONFIG); e.backward(e(batch)); optimizer.step()",
        "call engine.step() instead of optimizer.step()",
    ),
    "scheduler.step()": says(
        "e = start(scheduler={'type': 'WarmupLR'})\nfor _ in range(4):\n    train(e); e.lr_scheduler.step()",
        "lr_scheduler.step() is called by the program and by engine.step()",
        "remove the call",
    ),
    "an engine that was destroyed": says("e = start(); e.destroy(); e(batch)", "destroy()", "initialize()"),
    "no loss from the model": says(
        "e = start(Predictor()); e.train_batch(batch)", "no loss in the model's output", "'loss'"
    ),
    "train_batch() without data": says("e = start(); e.train_batch()", "train_batch()", "train_data"),
    "weights of torch.save()": says(
        "path = tempfile.mkdtemp() + '/weights.pt'; torch.save(Model().state_dict(), path)\n"
        "e = start(); e.load_module_state_dict(path)",
        "weights.pt' is a pickle",
        "torch.load(",
        "weights_only=True",
    ),
    "a checkpoint of several things": says(
        "e = start(); e.load_module_state_dict({'epoch': 1, 'model': Model().state_dict()})",
        "checkpoint of several things",
        "'model'",
    ),
    "weights of another model": says(
        "e = start(); e.load_module_state_dict(nn.Linear(4, 5).state_dict())",
        "'first.weight' is missing",
        "'weight' is not in the model",
    ),
    "a file for a folder": says(
        "e = start(); e.save_model(tempfile.__file__)", "is a file", "ends in '.safetensors', or a folder"
    ),
    "a device for a file": says("e = start(); e.save_model('/dev/full')", "'/dev/full' is a device", "name of a file"),
    "a loss that is not finite": says(
        "class Off(Model):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) + float('inf')\n"
        "e = start(Off()); train(e)",
        "step 1: the loss is inf although all gradients are finite",
        "look at how the loss is computed",
    ),
    "only gradients that are not finite": says(
        "class Bad(Model):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * (float('nan') if rank else 1.0)\n"
        "e = start(Bad(), max_consecutive_skipped_steps=2)\nfor _ in range(3):\n    train(e)",
        "2 steps in a row were skipped",
        "rank 1, first in parameter '",
        "lower the learning rate",
    ),
    "parameters in float64": says(
        "model = Model(); model.odd = nn.Linear(2, 2).double(); start(model)", "'odd.weight'", "float64", "freeze"
    ),
    "parameters without memory": says(
        "model = Model(); model.odd = nn.Linear(2, 2, device='meta'); start(model)", "'odd.weight'", "to_empty()"
    ),
    "an optimizer of another model": says(
        "partita.initialize(model=Model(), optimizer=torch.optim.AdamW(nn.Linear(3, 7).parameters()), config=CONFIG)",
        "group 0",
        "(7, 3)",
        "initialize()",
    ),
    "ReduceLROnPlateau": says(
        "plateau = torch.optim.lr_scheduler.ReduceLROnPlateau\n"
        "partita.initialize(model=Model(), lr_scheduler=lambda o: plateau(o), config=CONFIG)",
        "ReduceLROnPlateau",
        "step(metric)",
    ),
    "a model converted afterwards": says(
        "model = Model(); e = start(model); train(e); model.bfloat16(); e.backward(e(batch.bfloat16())); e.step()",
        "memory of parameter 'second.",
        "convert the model before",
    ),
    "a module exchanged afterwards": says(
        "model = Model(); e = start(model); train(e); model.second = nn.Linear(5, 1); train(e)",
        "' is no longer in the model",
    ),
    "a second engine for the model": says(
        "model = Model(); e = start(model); start(model)", "'first.weight' is trained by another engine", "destroy()"
    ),
}

# Each is one mistake of a program that does not do the same on all ranks.
RANKS: dict[str, Mistake] = {
    "another learning rate on each rank": says(
        "start(optimizer={'type': 'AdamW', 'params': {'lr': 1e-3 * (rank + 1)}})",
        "optimizer.params.lr is 0.001 on rank 0 and 0.002 on rank 1",
    ),
    "another learning rate on each rank, later": says(
        "e = start(); train(e); e.optimizer.param_groups[0]['lr'] = 0.1 * (rank + 1); train(e)",
        "optimizer.param_groups[0]['lr'] is 0.1 on rank 0 and 0.2 on rank 1",
        "on all ranks",
    ),
    "another stage on each rank": says(
        "start(zero_optimization={'stage': rank})", "zero_optimization.stage is 0 on rank 0 and 1 on rank 1"
    ),
    "another accumulation on each rank": says(
        "start(gradient_accumulation_steps=rank + 1)", "gradient_accumulation_steps is 1 on rank 0 and 2 on rank 1"
    ),
    "another model on each rank": says(
        "model = Model(); model.second = nn.Linear(5, 1 + rank); start(model)",
        "parameter second.weight is (1, 5) on rank 0 and (2, 5) on rank 1",
    ),
    "one rank saves": says(
        "e = start()\nif rank == 0:\n    e.save_model(tempfile.mkdtemp() + '/a')\nelse:\n    train(e)",
        "save_model() is called on every rank; rank 1 called backward()",
    ),
    "one rank has fewer batches": says(
        "e = start(); train(e)\nif rank == 0:\n    train(e)\ne.destroy()",
        "rank 1",
        "has left",
        "did it have fewer batches?",
    ),
}

MISTAKES = {**CONFIGS, **CALLS, **RANKS}

# As jobs of their own: what torchrun, two ranks and an error together make of the output.
JOBS: dict[str, Mistake] = {
    **{name: MISTAKES[name] for name in ("a key misspelt", "step() without backward", "weights of torch.save()")},
    "an error of one rank alone": says(
        "e = start(); train(e)\nif rank == 1:\n    raise KeyError('the sample 17')\ntrain(e)", "KeyError", "sample 17"
    ),
}
