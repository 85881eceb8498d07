"""Tests say which names of DeepSpeed's they call; `test_deepspeed_surface` compares that with the table of names."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])

TESTS = Path(__file__).parents[1]


def exercises(prefix: str, names: str, calls: str = "") -> Callable[[Test], Test]:
    """The decorated test calls these names: `prefix` + a name of `names` (+ a call of `calls`), with blanks between.

    Its source must have each of them as a word, or a constant of its file that has them: a list that a loop runs over.
    """
    return lambda test: test


@cache
def exercised() -> dict[str, str]:
    """Every name that a test says it calls, with the test.

    Raises:
        AssertionError: a test does not have the name that it says it calls.
    """
    return {name: f"{path.name}::{test}" for path in sorted(TESTS.rglob("test_*.py")) for name, test in _in_file(path)}


def _in_file(path: Path) -> Iterator[tuple[str, str]]:
    text = path.read_text()
    if "exercises(" not in text:
        return
    module = ast.parse(text)
    constants = {
        ast.unparse(node.targets[0]): node.value.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    for test in [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]:
        words = set(re.findall(r"\w+", "\n".join(ast.unparse(part) for part in test.body)))
        words |= {word for name in words & constants.keys() for word in constants[name].split()}
        for decorator in test.decorator_list:
            if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "exercises"):
                continue
            given = [constants.get(ast.unparse(each)) or ast.literal_eval(each) for each in decorator.args]
            prefix, names, calls = [*given, ""][:3]
            for name in [".".join(filter(None, part)) for part in product(names.split(), calls.split() or [""])]:
                missing = set(name.split(".")[-2 if calls else -1 :]) - words
                assert not missing, f"{path.name}::{test.name} calls '{prefix}{name}', it says, and has no {missing}"
                yield f"deepspeed.{prefix}{name}", test.name
