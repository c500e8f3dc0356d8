# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The types of what users call, which mmgcp/py.typed promises to their type checkers."""
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ['analysis', 'attention', 'darknet', 'datasets', 'deployment', 'distillation',
            'pipeline', 'pruning', 'pruning.layerwise', 'pruning.scores', 'sparsity', 'spatial']


def functions_of(item):
    """A function, or the public methods of a class that it has written itself."""
    if not inspect.isclass(item):
        return [item] if inspect.isfunction(item) else []
    return [value for name, value in vars(item).items()
            if inspect.isfunction(value) and (name == '__init__' or name[0] != '_')
            and value.__code__.co_filename != '<string>']  # of a dataclass


def untyped(function):
    """The arguments without a type, and 'return' if it says not what it returns."""
    signature = inspect.signature(inspect.unwrap(function))
    names = [name for name, parameter in signature.parameters.items()
             if parameter.annotation is parameter.empty and name not in ('self', 'cls')]
    if function.__name__ != '__init__' and signature.return_annotation is signature.empty:
        names.append('return')
    return names


@pytest.mark.parametrize('name', PACKAGES)
def test_all_that_is_public_has_types(name):
    package = importlib.import_module(f'mmgcp.{name}')
    functions = [function for public in package.__all__
                 for function in functions_of(getattr(package, public))]
    assert functions
    missing = {function.__qualname__: untyped(function) for function in functions}
    assert {key: names for key, names in missing.items() if names} == {}


def test_a_missing_type_is_found():
    def one(first: int, second, *rest, **options) -> None:
        pass

    def other(first: int):
        pass

    assert untyped(one) == ['second', 'rest', 'options'] and untyped(other) == ['return']


@pytest.mark.slow
def test_mypy(tmp_path):
    pytest.importorskip('mypy')
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--cache-dir', str(tmp_path)], cwd=str(ROOT),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
