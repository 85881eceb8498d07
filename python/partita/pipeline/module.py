"""A model as a pipeline: layers in stages, of which a rank builds its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from partita.comm import place_in_job
from partita.pipeline.build import build_stages
from partita.pipeline.division import Division, check_skips, divide, layer_weights
from partita.pipeline.layers import Layer, layer_name, take_layers
from partita.pipeline.shared import LOSS, Tie, find_replicas, find_ties
from partita.pipeline.stage import Checkpoints, Stage


@dataclass(frozen=True)
class _Plan:
    """All layers, until they are built: what is not of this rank goes with the plan."""

    layers: Sequence[Layer]
    weights: Sequence[float]
    skips: Mapping[int, tuple[int, ...]]
    seed: int


@dataclass(frozen=True)
class _Built:
    """What a rank has of the pipeline."""

    division: Division
    stages: dict[int, Stage]
    ties: list[Tie]
    replicas: dict[str, str]


class PipelineModule(nn.Module):
    """A model whose layers are on several ranks.

    The output of a layer is the one argument of the next, as in `nn.Sequential`. Layers are built when
    `partita.initialize()` knows the schedule, or when a program first asks for parameters, for modules or for a state
    dict: then each rank has one stage. A rank builds its own layers and drops the others. The values of a layer do not
    depend on where it is: each is built under a seed of its own, and the program's random numbers go on as if no layer
    had been built.
    The names of parameters begin with the layer's place in the whole model ("3.weight").

    Arguments have DeepSpeed's names and order. What Partita does not have is accepted with the value that asks for
    nothing.

    Args:
        layers: `LayerSpec`, `TiedLayerSpec`, modules, and functions without parameters; or an `nn.Sequential`. A
            parameter that several of the layers have stays one: stages have copies of it with equal values.
        num_stages: the ranks that hold the model together; None: all ranks of the job. It divides their number: ranks
            of the job / num_stages copies of the pipeline are data parallel.
        topology, seed_fn, activation_checkpoint_func: None.
        loss_fn: computes the loss from the last layer's output and the labels. A module's parameters are trained.
        seed_layers: seeds of layers begin at `base_seed`; else at a number that is drawn from torch's generator. They
            are those of initial values: random numbers of a forward are the program's.
        partition_method: what stages have about as much of. "parameters": parameters that are trained; "uniform":
            layers; "type:regex": layers of a class in whose name the expression is found, whatever the case; "cost":
            `layer_costs`.
        activation_checkpoint_interval: of so many layers, only what goes into the first one is kept for the backward;
            0: everything is kept.
        checkpointable_layers: names of classes: only runs of them are checkpointed. None: all are.
        dynamic_shape: either; shapes of micro-batches may differ always.
        skips: for the place of a layer, the places of earlier layers whose outputs it takes, too: `{4: [1]}` calls
            layer 4 with the output of layer 3 and that of layer 1. Functions may not change such outputs in place.
        layer_costs: the time of each layer, forward and backward, in any unit; the same on all ranks.

    Raises:
        TypeError, ValueError: names the argument or the layer.
    """

    loss_fn: Callable[..., Any] | None

    def __init__(
        self,
        layers: Iterable[Layer],
        num_stages: int | None = None,
        topology: None = None,
        loss_fn: Callable[..., Any] | None = None,
        seed_layers: bool = False,
        seed_fn: None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] | None = None,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
        *,
        skips: Mapping[int, Sequence[int]] | None = None,
        layer_costs: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _refuse(topology, seed_fn, activation_checkpoint_func)
        self.num_stages = _num_stages(num_stages)
        _set_unregistered(self, LOSS, _checked_loss(loss_fn))
        self.dynamic_shape = dynamic_shape
        taken = take_layers(layers)
        weights = layer_weights(taken, partition_method, layer_costs)
        checked = check_skips(skips or {}, len(taken))
        divide(weights, range(self.num_stages), self.num_stages, checked)  # so that what cannot be is said here
        self.layer_names = [layer_name(layer) for layer in taken]
        seed = base_seed if seed_layers else int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
        self._plan: _Plan | None = _Plan(taken, weights, checked, seed)
        self._built: _Built | None = None
        self._mode: bool | None = None  # what train() and eval() said before there was a layer
        self._checkpoint_classes = _class_names(checkpointable_layers)
        self.activation_checkpoint_interval = activation_checkpoint_interval

    def build(self, stage_ranks: Sequence[int] | None = None) -> None:
        """Builds the layers of this rank, and drops those of the others.

        Args:
            stage_ranks: the pipe rank of each stage, one stage after the other; None: each rank has one stage.

        Raises:
            ValueError: there are not as many layers, or ranks without a stage.
            RuntimeError: the layers are built already, in other stages.
        """
        ranks = tuple(range(self.num_stages) if stage_ranks is None else stage_ranks)
        if self._plan is None:
            if ranks != self.stage_ranks:
                raise RuntimeError(
                    f"PipelineModule: the layers are built, with stages on ranks {list(self.stage_ranks)}, and the "
                    f"schedule has them on {list(ranks)}: call build({list(ranks)}) right after the construction, or "
                    "ask for parameters, modules and state dicts only after initialize()"
                )
            return
        plan, loss_fn = self._plan, self.loss_fn
        division = divide(plan.weights, ranks, self.num_stages, plan.skips)
        rank, world_size = place_in_job()
        own = rank // (world_size // self.num_stages)
        here = [stage for stage, owner in enumerate(ranks) if owner == own]
        ties = find_ties(division, plan.layers, loss_fn)
        stages = build_stages(division, here, plan.layers, loss_fn, plan.seed, self._checkpoints())
        self._built = _Built(division, stages, ties, find_replicas(ties, here))
        self._plan = None
        self._register(loss_fn)
        if self._mode is not None:
            self.train(self._mode)

    def _register(self, loss_fn: Callable[..., Any] | None) -> None:
        """The layers become children, and so does the loss where it is computed."""
        vars(self).pop(LOSS, None)
        self._modules.pop(LOSS, None)
        last = len(self.bounds) - 1
        if isinstance(loss_fn, nn.Module) and last not in self.stages:
            loss_fn = _Elsewhere(self.stage_ranks[last])
        _set_unregistered(self, LOSS, loss_fn)
        for stage in self.stages.values():
            for name, module in stage._modules.items():
                vars(self).pop(name, None)
                self.add_module(name, module)

    def _have(self) -> _Built:
        if self._built is None:
            raise RuntimeError(
                "PipelineModule: stages are known when the layers are built: call partita.initialize(), or build()"
            )
        return self._built

    @property
    def stage_ranks(self) -> tuple[int, ...]:
        """The pipe rank of each stage."""
        return self._have().division.stage_ranks

    @property
    def bounds(self) -> list[range]:
        """The layers of each stage."""
        return list(self._have().division.bounds)

    @property
    def stages(self) -> dict[int, Stage]:
        """The stages of this rank, by number."""
        return self._have().stages

    @property
    def ties(self) -> list[Tie]:
        """Parameters that several stages have; the same on all ranks."""
        return self._have().ties

    @property
    def replicas(self) -> dict[str, str]:
        """Of this rank's parameters, the copies of what an earlier stage has, with the names there."""
        return self._have().replicas

    @property
    def skips(self) -> dict[int, tuple[int, ...]]:
        """For a layer the earlier layers whose outputs it takes beside that of the one before it."""
        return dict(self._have().division.skips)

    @property
    def skip_edges(self) -> set[tuple[int, int]]:
        """Pairs of stages, the second of which takes something from the first beside the chain."""
        return self._have().division.skip_edges

    def carried(self, a: int, b: int) -> list[int]:
        """The places of layers whose outputs go from stage `a` to stage `b` beside the chain."""
        return self._have().division.carried(a, b)

    @property
    def activation_checkpoint_interval(self) -> int:
        """Of so many layers, only what goes into the first one is kept for the backward; 0: everything."""
        return self._interval

    @activation_checkpoint_interval.setter
    def activation_checkpoint_interval(self, interval: int) -> None:
        """Raises ValueError for what is no number of layers."""
        if not isinstance(interval, int) or interval < 0:
            raise ValueError(
                f"PipelineModule: activation_checkpoint_interval is {interval!r}: it is a number of layers, 0 or more"
            )
        self._interval = interval
        for stage in self._built.stages.values() if self._built else ():
            stage.checkpoints = self._checkpoints()

    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self._interval, self._checkpoint_classes)

    def forward(self, x: Any, labels: Any = None) -> Any:
        """The output of the whole model, where all stages are on this rank; with labels and a `loss_fn`, the loss.

        Raises:
            RuntimeError: other ranks have some of the stages.
        """
        self._ensure_built()
        if len(self.stages) < len(self.bounds):
            raise RuntimeError(
                f"PipelineModule: {len(self.bounds)} stages are on {self.num_stages} ranks, so the model cannot be "
                "called: call engine.train_batch() or engine.eval_batch() on all ranks"
            )
        skipped: dict[int, Any] = {}
        for stage in self.stages.values():
            x, kept = stage(x, skipped, labels, with_loss=labels is not None)
            skipped.update(kept)
        return x

    # -- what a program asks of any module: the layers are built first

    def _ensure_built(self) -> None:
        if self._built is None:
            self.build()

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; also what `parameters()`, `buffers()` and `modules()` go through."""
        self._ensure_built()
        return super().named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; also what `children()`, `apply()`, `to()`, `half()` and `cuda()` go through."""
        self._ensure_built()
        return super().named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module: of the layers of this rank."""
        self._ensure_built()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module: of the layers of this rank."""
        self._ensure_built()
        return super().load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> PipelineModule:
        """As of any module. Does not build layers: they are as this says once they are there."""
        self.training, self._mode = mode, mode
        for stage in self._built.stages.values() if self._built else ():
            stage.train(mode)
        return self

    def extra_repr(self) -> str:
        """The layers, built or not."""
        return f"num_stages={self.num_stages}, layers=[{', '.join(self.layer_names)}]"


class _Elsewhere:
    """Stands for a loss with parameters on ranks that do not compute it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, *args: Any) -> Any:
        raise RuntimeError(
            f"PipelineModule: the loss is computed in the last stage, which is on pipe rank {self._rank}"
        )


def _set_unregistered(module: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute that does not become a child."""
    object.__setattr__(module, name, value)


def _refuse(topology: object, seed_fn: object, activation_checkpoint_func: object) -> None:
    """Raises ValueError, naming the argument, for what asks for another engine's parts."""
    if topology is not None:
        raise ValueError(
            "PipelineModule: topology is not supported: give num_stages; all other ranks of the job are data parallel"
        )
    if seed_fn is not None:
        raise ValueError(
            "PipelineModule: seed_fn is not supported: each layer is built under a seed of its own; leave it out, or "
            "give seed_layers and base_seed"
        )
    if activation_checkpoint_func not in (None, checkpoint):
        raise ValueError(
            "PipelineModule: activation_checkpoint_func is not supported: activations are checkpointed by "
            "torch.utils.checkpoint; leave it out, and give activation_checkpoint_interval"
        )


def _num_stages(num_stages: int | None) -> int:
    _, world_size = place_in_job()
    if num_stages is None:
        return world_size
    if not isinstance(num_stages, int) or num_stages < 1 or world_size % num_stages:
        raise ValueError(
            f"PipelineModule: num_stages is {num_stages!r}, and the job has {world_size} ranks: give a number that "
            "divides the number of ranks"
        )
    return num_stages


def _class_names(checkpointable_layers: object) -> frozenset[str] | None:
    if checkpointable_layers is None:
        return None
    names = checkpointable_layers if isinstance(checkpointable_layers, list | tuple | set | frozenset) else [None]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"PipelineModule: checkpointable_layers is {checkpointable_layers!r}: give a list of names of classes"
        )
    return frozenset(names)


def _checked_loss(loss_fn: Any) -> Any:
    if loss_fn is not None and (not callable(loss_fn) or isinstance(loss_fn, type)):
        raise TypeError(
            f"PipelineModule: loss_fn is {loss_fn!r}: it is a function, or a module, of the output and the labels"
        )
    return loss_fn
