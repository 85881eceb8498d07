"""Which modules of a model are units in stage 3: pure decisions about its tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

LEAF = "_z3_leaf"  # an attribute, of modules and of their parameters, under the name that DeepSpeed has for it


def is_leaf(module: nn.Module) -> bool:
    """Whether a program wants the module to be gathered as a whole, see `zero.set_z3_leaf_module`."""
    return bool(getattr(module, LEAF, False))


def find_blocks(
    model: nn.Module,
    classes: Sequence[str] | None,
    key: str = "zero_optimization.unit_classes",
    *,
    with_leaves: bool = True,
) -> list[nn.Module]:
    """The layers of a model, in order of registration; none lies inside another.

    Args:
        classes: names of their classes; None: the repeated children of `ModuleList` and `Sequential`, which is
            what the layers of most models are.
        with_leaves: a leaf module is a layer, and none is inside of it.

    Raises:
        ValueError: no module is of a class that is named.
    """
    blocks: list[nn.Module] = []
    if not (with_leaves and is_leaf(model)):  # else there is nothing but the root
        _add_blocks(model, None if classes is None else set(classes), blocks, with_leaves)
    if classes is not None:
        present = {type(module).__name__ for module in model.modules()}
        for name in classes:
            if name not in present:
                raise ValueError(
                    f"{key}: the model has no module of class '{name}'; it has " + ", ".join(sorted(present))
                )
    return blocks


def _add_blocks(module: nn.Module, classes: set[str] | None, blocks: list[nn.Module], with_leaves: bool) -> None:
    repeated: set[type] = set()
    if isinstance(module, nn.ModuleList | nn.Sequential):
        counts = Counter(type(child) for child in module.children() if any(True for _ in child.parameters()))
        repeated = {kind for kind, count in counts.items() if count > 1}
    for child in module.children():
        is_block = type(child) in repeated if classes is None else type(child).__name__ in classes
        is_block |= with_leaves and is_leaf(child) and any(True for _ in child.parameters())
        if is_block and child not in blocks:
            blocks.append(child)
        elif not is_block:
            _add_blocks(child, classes, blocks, with_leaves)


def owners_of(parameters: list[nn.Parameter], blocks: list[nn.Module], model: nn.Module) -> list[int | None]:
    """For each parameter the index of the one block that it belongs to; None: it is used outside of blocks or in
    several of them, and belongs to the root."""
    inside = [set(block.parameters()) for block in blocks]
    members = {module for block in blocks for module in block.modules()}
    outside = {p for module in model.modules() if module not in members for p in module._parameters.values()}
    result: list[int | None] = []
    for parameter in parameters:
        found = [i for i, block in enumerate(inside) if parameter in block]
        result.append(found[0] if len(found) == 1 and parameter not in outside else None)
    return result


def watched_modules(
    model: nn.Module, blocks: list[nn.Module]
) -> Iterator[tuple[nn.Module, int | None, frozenset[int]]]:
    """The modules whose forward brings parameters: each with its index if it is a block, and with the blocks in it.

    What is inside of a layer is called by the layer. More modules than that would only cost time. Leaves outside of
    layers may be called by any method of the model.
    """
    block_of = {block: i for i, block in enumerate(blocks)}
    inside = {part for block in blocks for part in block.modules()} - block_of.keys()
    in_layers = {part for layer in find_blocks(model, None) for part in layer.modules()} - block_of.keys()
    for module in model.modules():
        has_parts = any(True for _ in module.children())
        is_called = type(module).forward is not nn.Module.forward  # unlike a list of modules
        if is_called and module not in inside and (has_parts or (module._parameters and module not in in_layers)):
            yield module, block_of.get(module), frozenset(block_of[m] for m in module.modules() if m in block_of)
