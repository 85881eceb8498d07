"""DeepSpeed's pipelines, recomputation, partitioned parameters and collectives in one process, by their names."""

from __future__ import annotations

from typing import Any

import partita
import partita.compat.deepspeed as deepspeed
import pytest
import torch
from partita.compat.deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from partita.compat.deepspeed.runtime.pipe import PipeDataParallelTopology, ProcessTopology
from surface import exercises
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
}
SAMPLES = [(torch.ones(2, 3), torch.zeros(2, 1))] * 8

# -- pipelines


def layers() -> list[Any]:
    return [LayerSpec(nn.Linear, 3, 4), nn.ReLU(), LayerSpec(nn.Linear, 4, 1)]


def pipeline(**arguments: Any) -> PipelineModule:
    return PipelineModule(layers(), loss_fn=nn.MSELoss(), **({"num_stages": 1} | arguments))


@exercises("", "PipelineEngine PipelineModule pipe")
@exercises("runtime.pipe.engine.", "PipelineEngine")
@exercises("PipelineEngine.", "train_batch eval_batch is_first_stage is_last_stage get_pipeline_parallel_rank")
@exercises(
    "PipelineEngine.", "set_dataiterator set_dataloader is_gradient_accumulation_boundary reset_activation_shape"
)
@exercises("PipelineEngine.", "module_state_dict load_module_state_dict forward backward step")
def test_a_pipeline_trains():
    engine = deepspeed.initialize(model=deepspeed.PipelineModule(layers(), 1, loss_fn=nn.MSELoss()), config=CONFIG)[0]
    assert isinstance(engine, deepspeed.PipelineEngine) and isinstance(engine, deepspeed.DeepSpeedEngine)
    assert deepspeed.runtime.pipe.engine.PipelineEngine is deepspeed.PipelineEngine
    assert isinstance(engine.module, deepspeed.pipe.PipelineModule)
    assert engine.is_first_stage() and engine.is_last_stage() and engine.get_pipeline_parallel_rank() == 0
    assert engine.is_gradient_accumulation_boundary()
    before = engine.eval_batch(iter(SAMPLES), compute_loss=True, bcast_loss=True)
    engine.train_batch(data_iter=iter(SAMPLES))
    engine.set_dataiterator(iter(SAMPLES))
    engine.train_batch()
    engine.set_dataloader(SAMPLES)
    for _ in range(5):
        engine.train_batch()
    engine.reset_activation_shape()
    assert engine.global_steps == 7 and engine.eval_batch(iter(SAMPLES), num_micro_batches=1) < before
    engine.load_module_state_dict({name: 0 * value for name, value in engine.module_state_dict().items()})
    assert engine.eval_batch(iter(SAMPLES)) == 0
    with pytest.raises(ValueError, match="return_logits"):
        engine.eval_batch(iter(SAMPLES), return_logits=True)
    for call, given in ((engine.forward, [torch.ones(2, 3)]), (engine.backward, [torch.ones(())]), (engine.step, [])):
        with pytest.raises(RuntimeError, match="train_batch"):
            call(*given)
    engine.destroy()


@exercises("pipe.", "PipelineModule LayerSpec LayerSpec.build TiedLayerSpec TiedLayerSpec.build")
@exercises("pipe.", "PipelineModule", "num_pipeline_stages topology set_checkpoint_interval forward")
@exercises("runtime.pipe.", "PipelineModule LayerSpec TiedLayerSpec")
@exercises("runtime.pipe.module.", "PipelineModule LayerSpec TiedLayerSpec")
def test_a_model_as_layers():
    assert LayerSpec(nn.Linear, 3, 4).build().weight.shape == (4, 3)
    names = ("PipelineModule", "LayerSpec", "TiedLayerSpec")
    for place in (deepspeed.pipe, deepspeed.runtime.pipe, deepspeed.runtime.pipe.module):
        assert [getattr(place, name) for name in names] == [PipelineModule, LayerSpec, TiedLayerSpec]
    model = pipeline(topology=PipeDataParallelTopology(num_pp=1, num_dp=1), num_stages=None)
    assert model.num_pipeline_stages() == 1 and model.topology().get_dim("pipe") == 1
    model.set_checkpoint_interval(2)
    assert model.forward(torch.ones(2, 3)).shape == (2, 1)
    engine = deepspeed.initialize(model=model, config=CONFIG)[0]
    engine.train_batch(iter(SAMPLES))
    engine.destroy()
    assert TiedLayerSpec("t", nn.Linear, 3, 3).build().bias.shape == (3,)
    tied = PipelineModule([TiedLayerSpec("t", nn.Linear, 3, 3), TiedLayerSpec("t", nn.Linear, 3, 3)], num_stages=1)
    assert len(list(tied.parameters())) == 2


@pytest.mark.parametrize(
    ("topology", "stages", "error"),
    [
        (ProcessTopology(["data", "pipe"], [1, 1]), None, "'pipe', then 'data'"),
        (ProcessTopology(["pipe", "data", "model"], [1, 1, 2]), None, "no other axis"),
        (ProcessTopology(["pipe", "data"], [1, 1]), 2, "give one of them"),
    ],
)
def test_topologies_that_no_pipeline_has(topology: ProcessTopology, stages: int | None, error: str):
    with pytest.raises(ValueError, match=error):
        pipeline(topology=topology, num_stages=stages)


@exercises("checkpointing.", "checkpoint")
def test_layers_are_recomputed_as_deepspeeds_function_does_it():
    checkpoint = deepspeed.checkpointing.checkpoint
    model = pipeline(activation_checkpoint_interval=1, activation_checkpoint_func=checkpoint)
    assert model.activation_checkpoint_interval == 1
    with pytest.raises(ValueError, match="activation_checkpoint_func is not supported"):
        pipeline(activation_checkpoint_func=lambda function, *args: function(*args))


# -- recomputation


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x: Tensor, *, times: int = 1) -> Tensor:
        self.calls += 1
        return torch.dropout(torch.relu(self.linear(x)), 0.5, True) * times


@exercises("", "checkpointing")
@exercises("checkpointing.", "checkpoint configure is_configured reset non_reentrant_checkpoint set_num_layers")
@exercises("checkpointing.", "partition_activations_in_checkpoint")
@pytest.mark.parametrize("on_host", [False, True], ids=["", "on the host"])
def test_activations_are_computed_again(on_host: bool):
    ds = deepspeed.checkpointing
    ds.configure(None, checkpoint_in_cpu=on_host, partition_activations=True)
    assert ds.is_configured()
    ds.set_num_layers(2)
    ds.partition_activations_in_checkpoint(True)
    layer, x = Counted(), torch.ones(2, 3, requires_grad=True)
    expected = []
    for call in (lambda x: layer(x, times=2), lambda x: ds.checkpoint(layer, x, times=2)):
        torch.manual_seed(3)
        layer.calls, x.grad = 0, None
        call(x).sum().backward()
        expected.append((x.grad, layer.calls))
    (plain, once), (again, twice) = expected
    assert torch.equal(plain, again) and (once, twice) == (1, 2)
    assert ds.non_reentrant_checkpoint is ds.checkpoint
    ds.reset()
    ds.configure(None, deepspeed_config={"activation_checkpointing": {"cpu_checkpointing": False}})


@exercises("checkpointing.", "get_cuda_rng_tracker model_parallel_cuda_manual_seed CudaRNGStatesTracker")
@exercises("checkpointing.", "model_parallel_reconfigure_tp_seed")
@exercises("checkpointing.", "CudaRNGStatesTracker", "reset get_states set_states add fork")
def test_random_generators_by_name():
    ds = deepspeed.checkpointing
    ds.model_parallel_cuda_manual_seed(7)
    tracker, device = ds.get_cuda_rng_tracker(), deepspeed.get_accelerator().current_device_name()
    drawn = []
    for seed in (ds.model_parallel_cuda_manual_seed, ds.model_parallel_reconfigure_tp_seed):
        seed(7)
        with tracker.fork():
            inner = torch.rand(1, device=device)
        drawn.append((inner, torch.rand(1, device=device)))
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]
    own = ds.CudaRNGStatesTracker()
    own.add("a", 1)
    states = own.get_states()
    with own.fork("a"):
        first = torch.rand(1, device=device)
    own.set_states(states)
    with own.fork("a"):
        assert torch.rand(1, device=device) == first
    with own.fork("a"):
        assert torch.rand(1, device=device) != first  # it goes on
    ds.model_parallel_cuda_manual_seed(7)
    with own.fork("a"):
        torch.rand(3, device=device)
    assert torch.rand(1, device=device) == drawn[0][1]  # and leaves the program's as it was
    with pytest.raises(ValueError, match="'a' or of the seed 1"):
        own.add("a", 1)
    own.reset()
    with pytest.raises(KeyError, match="add"), own.fork("a"):
        pass


# -- partitioned parameters


@exercises("", "zero")
@exercises("zero.", "Init GatheredParameters register_external_parameter unregister_external_parameter")
@exercises("zero.", "ZeroParamStatus ZeroParamType")
@exercises("runtime.zero.utils.", "is_zero_param")
@exercises("utils.", "safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state")
@exercises("utils.", "safe_set_full_fp32_param safe_set_full_grad safe_set_full_optimizer_state")
@exercises("utils.", "safe_update_full_grad_vectorized")
def test_whole_parameters_of_stage_3():
    tools, zero = deepspeed.utils, deepspeed.zero
    config = CONFIG | {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 1}
    with zero.Init(config_dict_or_path=config):
        model = nn.Linear(3, 1)
    zero.register_external_parameter(model, model.bias)
    zero.unregister_external_parameter(model, model.bias)
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.backward(engine(torch.ones(4, 3)).square().mean())
    gradient = tools.safe_get_full_grad(model.weight)
    tools.safe_set_full_grad(model.weight, gradient + 1)
    tools.safe_update_full_grad_vectorized([model.weight], lambda old, parameter: old * 2)
    torch.testing.assert_close(tools.safe_get_full_grad(model.weight), (gradient + 1) * 2)
    engine.step()
    assert tools.safe_get_full_optimizer_state(model.weight, "exp_avg").shape == (1, 3)
    tools.safe_set_full_optimizer_state(model.weight, torch.zeros(1, 3), "exp_avg")
    assert not tools.safe_get_full_optimizer_state(model.weight, "exp_avg").any()
    tools.safe_set_full_fp32_param(model.weight, torch.full((1, 3), 2.0))
    assert (tools.safe_get_full_fp32_param(model.weight) == 2).all()
    with zero.GatheredParameters([model.weight], modifier_rank=0):
        model.weight.data.fill_(3)
    assert (tools.safe_get_full_fp32_param(model.weight) == 3).all()
    is_zero_param = deepspeed.runtime.zero.utils.is_zero_param
    assert is_zero_param(model.weight) and model.weight.ds_shape == (1, 3) and not is_zero_param(torch.ones(1))
    assert zero.ZeroParamStatus.AVAILABLE and zero.ZeroParamType.NORMAL
    engine.destroy()


@exercises("utils.", "set_z3_leaf_module set_z3_leaf_modules set_z3_leaf_modules_by_name")
@exercises("utils.", "set_z3_leaf_modules_by_suffix unset_z3_leaf_modules get_z3_leaf_modules z3_leaf_module")
@exercises("utils.", "z3_leaf_parameter")
def test_modules_that_are_gathered_whole():
    tools = deepspeed.utils
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    tools.set_z3_leaf_module(model[0], True)
    assert tools.get_z3_leaf_modules(model) == [model[0]] and tools.z3_leaf_parameter(model[0].weight)
    assert tools.set_z3_leaf_modules(model, [nn.Linear]) == [model[0], model[2]] and tools.z3_leaf_module(model[2])
    tools.unset_z3_leaf_modules(model, [nn.Linear])
    assert tools.set_z3_leaf_modules_by_name(model, ["2"])[0] == [model[2]]
    assert tools.set_z3_leaf_modules_by_suffix(model, ["0"])[0] == [model[0]]


# -- collectives


@exercises("", "init_distributed comm ops __version__")
@exercises("comm.", "init_distributed is_initialized get_rank get_world_size get_local_rank barrier")
@exercises("comm.", "all_reduce all_gather broadcast reduce_scatter new_group get_world_group ReduceOp")
@exercises("utils.groups.", "get_data_parallel_group")
@exercises("utils.", "get_data_parallel_group")
def test_collectives_of_one_rank(monkeypatch):
    deepspeed.init_distributed(dist_backend="gloo")
    dist = deepspeed.comm
    dist.init_distributed()
    assert dist.is_initialized() and (dist.get_rank(), dist.get_world_size(), dist.get_local_rank()) == (0, 1, 0)
    x, out = torch.ones(2), [torch.zeros(2)]
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=dist.get_world_group())
    dist.all_gather(out, x, group=deepspeed.utils.groups.get_data_parallel_group())
    dist.broadcast(x, 0)
    dist.reduce_scatter(x, out)
    dist.barrier(group=dist.new_group([0]))
    assert torch.equal(x, torch.ones(2)) and torch.equal(out[0], x)
    assert deepspeed.ops.adam.FusedAdam and deepspeed.__version__.count(".") >= 2
    assert issubclass(deepspeed.ops.adam.FusedAdam, partita.FusedAdam)
