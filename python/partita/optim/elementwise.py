"""Whether an optimizer treats every element by itself, found out by trying it."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer

from partita.device import HOST

PROBE_SHAPES = ((4, 6), (5,))
PROBE_STEPS = 3


def why_not_elementwise(optimizer: Optimizer) -> str | None:
    """None if updating pieces of parameters gives the bits that updating the whole parameters gives, else the reason.

    An optimizer that uses shapes, norms or ranks of whole tensors (LAMB, Adafactor, Muon), that couples parameters, or
    that needs a closure (LBFGS) cannot run over shards. A copy of the optimizer is tried on small random tensors, once
    whole and once in pieces; the optimizer itself is not touched.
    """
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), HOST)
    generator = torch.Generator(HOST).manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=HOST).to(device)

    start = [random(shape) for shape in PROBE_SHAPES]
    grads = [[random(shape) for shape in PROBE_SHAPES] for _ in range(PROBE_STEPS)]
    try:
        whole = [_run(optimizer, [t], [[g[i]] for g in grads])[0] for i, t in enumerate(start)]
        together = _run(optimizer, start, grads)
        pieces = [torch.cat(_run(optimizer, _halves(t), [_halves(g[i]) for g in grads])) for i, t in enumerate(start)]
    except Exception as error:
        return f"it fails on pieces of parameters ({type(error).__name__}: {error})"
    if any(torch.equal(a, b) for a, b in zip(whole, start, strict=True)):
        return "its step() does not reach the parameters in its param_groups"
    if not all(torch.equal(a, b) for a, b in zip(whole, together, strict=True)):
        return "its update of one parameter depends on the others"
    if not all(torch.equal(a.flatten(), b) for a, b in zip(whole, pieces, strict=True)):
        return "its update of a piece differs from its update of the whole parameter"
    return None


def _halves(tensor: Tensor) -> list[Tensor]:
    flat = tensor.flatten()
    cut = flat.numel() // 3
    return [flat[:cut], flat[cut:]]


def _run(optimizer: Optimizer, start: list[Tensor], grads: list[list[Tensor]]) -> list[Tensor]:
    """The tensors after a step per row of `grads`, in every param group's setting one after the other."""
    tensors = [t.clone() for t in start]
    for group in optimizer.param_groups:
        probe = _stateless_copy(optimizer)
        # A learning rate of zero (before a warm-up) would hide everything.
        probe.param_groups = [{**group, "lr": 0.01, "params": tensors}]
        for row in grads:
            for tensor, grad in zip(tensors, row, strict=True):
                tensor.grad = grad.clone()
            probe.step()
    return [t.detach() for t in tensors]


def _stateless_copy(optimizer: Optimizer) -> Optimizer:
    """With all attributes (copy.copy keeps torch's only), but none of the hooks that users put on its step."""
    probe = object.__new__(type(optimizer))
    probe.__dict__.update({name: copy.copy(value) for name, value in vars(optimizer).items() if name != "step"})
    probe.state = defaultdict(dict)
    probe._optimizer_step_pre_hooks = OrderedDict()
    probe._optimizer_step_post_hooks = OrderedDict()
    return probe
