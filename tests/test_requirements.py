# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Every package that is imported is declared, or belongs to the stack mmgcp is installed into."""
import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 10):
    pytest.skip('sys.stdlib_module_names is new in Python 3.10', allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
# See requirements/runtime.txt
STACK = {'torch', 'mmengine', 'mmcv', 'mmdet', 'mmyolo', 'cv2', 'PIL'}


def declared(*names):
    """Names of the modules that the packages in requirements/*.txt bring."""
    lines = [line for name in names
             for line in (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()]
    return {re.match(r'[\w-]+', line).group().replace('-', '_')
            for line in lines if line and not line.startswith('#')}


def imported(*folders):
    """Names of the packages that the code in folders imports from elsewhere, with one file."""
    found = {}
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob('*.py'))]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            found.update((module.split('.')[0], path) for module in modules)
    foreign = set(found) - set(sys.stdlib_module_names) - {'mmgcp'}
    if folders != ('mmgcp', ):  # scripts and tests import files beside themselves
        foreign -= {name for path in paths for name in (path.stem, path.parent.name)}
    return {name: found[name] for name in foreign}


@pytest.mark.parametrize('folders, requirements', [
    (('mmgcp', ), ('runtime', 'pruning', 'deployment')),
    (('tools', ), ('runtime', 'pruning')),
    (('tests', 'benchmarks'), ('runtime', 'pruning', 'tests')),
])
def test_imports_are_declared(folders, requirements):
    missing = set(imported(*folders)) - declared(*requirements) - STACK
    assert not missing, {name: str(imported(*folders)[name]) for name in missing}


def test_requirements_of_runtime_are_imported():
    assert declared('runtime') <= set(imported('mmgcp')) | set(imported('tools'))
