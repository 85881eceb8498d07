"""F20: tensors that have no memory of their own reach no address: kernels, engines and loading refuse them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import partita
import pytest
import torch
import torch.distributed as dist
from partita.device import kernels
from partita.zero import load_weights
from small_models import Regression, config, inputs, seeded
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

pytestmark = pytest.mark.filterwarnings("ignore:.*beta state.*", "ignore:.*prototype.*")


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """DTensors need one."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    if made:
        dist.destroy_process_group()


def _fake() -> Tensor:
    with FakeTensorMode():
        return torch.empty(4, 4)


def _released() -> Tensor:
    tensor = torch.ones(32)[16:].view(4, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "DTensor": (lambda: distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)]), "is a DTensor"),
    "fake": (_fake, "is a FakeTensor"),
    "subclass": (lambda: TwoTensor(torch.ones(4, 4), torch.ones(4, 4)), "is a TwoTensor"),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(4, 4)), "torch.func"),
    "meta": (lambda: torch.ones(4, 4, device="meta"), "meta"),
    "sparse": (lambda: torch.eye(4).to_sparse(), "sparse_coo"),
    "compressed": (lambda: torch.eye(4).to_sparse_csr(), "sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(4), torch.ones(4)]), "nested"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(4)], layout=torch.jagged), "is a NestedTensor"),
    "opaque": (lambda: torch.ones(4, 4).to_mkldnn(), "mkldnn"),
    "lazy zero": (lambda: torch._efficientzerotensor((4, 4)), "lazy zero"),
    "released": (_released, "no memory"),
}
NEGATED = ("negated", (lambda: torch.ones(1, dtype=torch.complex64).conj().imag, "lazy negation"))


@pytest.mark.parametrize("kind", [*ODD, NEGATED[0]])
def test_no_address_is_taken(kind):
    """Of what has none, wherever it comes in: sources, destinations, gradients of an optimizer."""
    make, says = {**ODD, NEGATED[0]: NEGATED[1]}[kind]
    tensor = make()
    for call in (kernels.address, kernels.span):
        with pytest.raises(ValueError, match=f"^odd .*{says}"):
            call(tensor, "odd")
    with pytest.raises(ValueError, match=f"{says}|destination is on"):
        kernels.cast(torch.ones(16), tensor)


def test_an_empty_tensor_has_an_address_and_so_has_a_view():
    assert kernels.address(torch.empty(0)) == 0
    base = torch.ones(8)
    assert kernels.address(base[3:]) == base.data_ptr() + 12
    assert kernels.address(nn.Parameter(base)) == base.data_ptr()


class WithOdd(Regression):
    """A trained or frozen parameter, or a buffer, that is no plain tensor."""

    def __init__(self, tensor: Tensor, role: str) -> None:
        super().__init__()
        if role == "buffer":
            self.register_buffer("odd", tensor)
        else:
            self.odd = nn.Parameter(tensor, requires_grad=role == "trained")


# A released storage is that of an absent parameter, whose class refuses its use; a lazy zero is none once it is a leaf.
PARAMETERS = sorted(ODD.keys() - {"released", "lazy zero", "functional"})


@pytest.mark.parametrize("role", ["trained", "frozen"])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_a_parameter_is_refused_by_name(kind, role):
    """Before anything of the model has changed."""
    make, says = ODD[kind]
    model = WithOdd(make(), role)
    before = model.first.weight
    for stage in (0, 3):
        settings = config(zero_optimization={"stage": stage})
        with pytest.raises(ValueError, match=rf"(?s)'odd'.*{says}"):
            partita.initialize(
                model=model, config=settings, optimizer=torch.optim.SGD(model.first.parameters(), lr=0.1)
            )
    assert model.first.weight is before and type(before) is nn.Parameter
    del model.odd
    engine = partita.Engine(model, config=config())
    engine.destroy()


def test_a_lazy_module_is_told_to_run_first():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet.*run the model on one batch"):
        partita.Engine(model, config=config())
    model(torch.ones(1, 4))
    partita.Engine(model, config=config()).destroy()


@pytest.mark.parametrize("kind", ["sparse", "compressed", "nested", "opaque"])
def test_a_buffer_of_the_only_rank_stays_as_it_is(kind):
    """An adjacency matrix, say: there is nobody whose values it could take."""
    model = WithOdd(ODD[kind][0](), "buffer")
    buffer = model.odd
    engine = partita.Engine(model, config=config())
    assert model.odd is buffer
    engine.backward(engine(inputs(samples=2)))
    engine.step()
    engine.destroy()


@pytest.mark.parametrize("kind", ["DTensor", "fake", "meta", "sparse", "released"])
def test_weights_without_values_are_refused_by_name(kind):
    """Before any rank waits for them."""
    make, says = ODD[kind]
    model = seeded(lambda: nn.Linear(4, 4))
    before = model.weight.detach().clone()
    source: dict[str, Any] = {"weight": make(), "bias": torch.ones(4)}
    with pytest.raises(ValueError, match=f"'weight' in the weights.*{says}"):
        load_weights(model, source)
    assert torch.equal(model.weight, before)
    assert not model.bias.eq(1).all()
