"""Modules that stage 3 gathers as a whole, and parameters that a module uses without owning them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from partita.units import LEAF, has_reducer, is_leaf

ClassNames = Sequence[type[nn.Module]] | Sequence[str]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Says whether stage 3 gathers a module as a whole, instead of its repeated layers one by one.

    That is faster for a module with many small layers, such as a mixture of experts. It is never needed for a right
    result: layers that some ranks leave out are gathered there too.

    Raises:
        RuntimeError: an engine trains the module already, and gathers it as it did when it was made.
    """
    if any(has_reducer(parameter) for parameter in model.parameters()):
        raise RuntimeError(
            f"module '{type(model).__name__}' is trained by an engine, which has decided what it gathers together: set "
            "leaf modules before initialize()"
        )
    for part in (model, *model.parameters()):
        setattr(part, LEAF, flag)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: ClassNames, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Marks all modules of some classes, see `set_z3_leaf_module`. Returns these modules.

    Args:
        leaf_module_classes: classes, or their names, with or without the name of the Python module that has them.

    Raises:
        ValueError: the model has no module of these classes, and `raise_if_not_found` is set; names those that it has.
    """
    return _set_by_class(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: ClassNames, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """The reverse of `set_z3_leaf_modules`, with the same arguments and errors."""
    return _set_by_class(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Sequence[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Marks modules by their names in the model, such as "layers.3.experts", see `set_z3_leaf_module`.

    Returns:
        The modules, and the names that no module has.

    Raises:
        ValueError: there are such names, and `raise_if_not_found` is set.
    """
    return _set_by_name(model, module_names, flag, raise_if_not_found, lambda name, wanted: name == wanted)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Sequence[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """As `set_z3_leaf_modules_by_name`, of all modules whose names end with one of these."""
    return _set_by_name(model, module_name_suffixes, flag, raise_if_not_found, str.endswith)


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that are marked."""
    return [module for module in model.modules() if is_leaf(module)]


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether a module is marked, see `set_z3_leaf_module`."""
    return is_leaf(model)


def z3_leaf_parameter(parameter: nn.Parameter) -> bool:
    """Whether a parameter belonged to a module when that was marked."""
    return bool(getattr(parameter, LEAF, False))


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Accepted, and not needed.

    DeepSpeed must be told when a module computes with a parameter of another module. Here a parameter that is not there
    is brought when the model computes with it, in forward and in backward, whoever owns it.

    Raises:
        TypeError: these are not a module and a parameter.
    """
    if not isinstance(module, nn.Module) or not isinstance(parameter, nn.Parameter):
        raise TypeError(
            "register_external_parameter() takes a module and a parameter, not "
            f"{type(module).__name__} and {type(parameter).__name__}"
        )


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Accepted, and without effect as `register_external_parameter`, with the same error."""
    register_external_parameter(module, parameter)


def _set_by_class(model: nn.Module, classes: ClassNames, flag: bool, must_exist: bool) -> list[nn.Module]:
    wanted: list[str | type[nn.Module]] = [classes] if isinstance(classes, str | type) else list(classes)
    for each in wanted:
        if not isinstance(each, str | type):
            raise TypeError(f"leaf_module_classes: {each!r} is neither a class nor the name of one")
    found = [module for module in model.modules() if any(_is_a(module, each) for each in wanted)]
    if not found and must_exist:
        names = [each if isinstance(each, str) else each.__name__ for each in wanted]
        present = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(f"the model has no module of class {_joined(names)}; it has {_joined(present)}")
    return _set(found, flag)


def _set_by_name(
    model: nn.Module, wanted: Sequence[str], flag: bool, must_exist: bool, fits: Callable[[str, str], bool]
) -> tuple[list[nn.Module], list[str]]:
    modules = dict(model.named_modules())
    found = {module: None for each in wanted for name, module in modules.items() if fits(name, each)}
    missing = [each for each in wanted if not any(fits(name, each) for name in modules)]
    if missing and must_exist:
        raise ValueError(f"the model has no module {_joined(missing)}; it has {_joined(modules)}")
    return _set(list(found), flag), missing


def _is_a(module: nn.Module, kind: str | type) -> bool:
    if not isinstance(kind, str):
        return isinstance(module, kind)
    own = type(module)
    return kind in (own.__name__, own.__qualname__, f"{own.__module__}.{own.__qualname__}")


def _set(modules: list[nn.Module], flag: bool) -> list[nn.Module]:
    for module in modules:
        set_z3_leaf_module(module, flag)
    return modules


def _joined(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names if name)
