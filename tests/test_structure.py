# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How the package is built: what may import what, and how long files and functions are."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / 'mmgcp').rglob('*.py'))
# Levels of the package, lowest first; a module may import those of lower levels and of its own
LEVELS = [
    ['mmgcp.version', 'mmgcp.errors'],
    ['mmgcp.compatibility', 'mmgcp.registry'],
    ['mmgcp.utils'],
    ['mmgcp.nn'],
    ['mmgcp.analysis', 'mmgcp.datasets', 'mmgcp.models'],
    ['mmgcp.spatial'],
    ['mmgcp.deployment'],
    ['mmgcp.pruning'],
    ['mmgcp.pruning.layerwise', 'mmgcp.attention', 'mmgcp.darknet'],
    ['mmgcp.sparsity', 'mmgcp.distillation'],
    ['mmgcp.pipeline'],
    ['mmgcp'],
]
MAX_FILE, MAX_FUNCTION = 300, 60  # lines, docstrings and signatures included


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {name_of(path): path for path in FILES}


def level_of(module):
    """The level of the longest prefix that has one."""
    found = [(len(prefix), level) for level, prefixes in enumerate(LEVELS) for prefix in prefixes
             if module == prefix or module.startswith(f'{prefix}.')]
    return max(found)[1]


def imports_of(module):
    """The modules of the package that a module imports, also inside of functions."""
    path, found = MODULES[module], set()
    package = module if path.name == '__init__.py' else module.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parts = package.split('.')
                base = '.'.join([*parts[:len(parts) - node.level + 1], *filter(None, [base])])
            inner = {f'{base}.{alias.name}' for alias in node.names} & set(MODULES)
            found |= inner or ({base} & set(MODULES))
    return found - {module}


IMPORTS = {module: imports_of(module) for module in MODULES}


@pytest.mark.parametrize('module', sorted(MODULES))
def test_imports_go_downward(module):
    upward = [other for other in IMPORTS[module] if level_of(other) > level_of(module)]
    assert not upward, f'{module} imports {upward} of a higher level'


def test_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, ' -> '.join([*path[path.index(module):], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(IMPORTS[module]):
            visit(other)
        done.add(path.pop())

    for module in sorted(MODULES):
        visit(module)


def test_the_reader_sees_upward_and_circular_imports(tmp_path, monkeypatch):
    """The two tests above can fail."""
    (tmp_path / 'mmgcp' / 'nn').mkdir(parents=True)
    (tmp_path / 'mmgcp' / 'nn' / 'low.py').write_text(
        'def f():\n    from mmgcp.pipeline import high\n')
    (tmp_path / 'mmgcp' / 'pipeline').mkdir()
    (tmp_path / 'mmgcp' / 'pipeline' / 'high.py').write_text('from ..nn import low\n')
    modules = {f'mmgcp.{name}': tmp_path / 'mmgcp' / f'{name.replace(".", "/")}.py'
               for name in ('nn.low', 'pipeline.high')}
    monkeypatch.setitem(globals(), 'MODULES', modules)
    assert imports_of('mmgcp.nn.low') == {'mmgcp.pipeline.high'}
    assert imports_of('mmgcp.pipeline.high') == {'mmgcp.nn.low'}
    assert level_of('mmgcp.pipeline.high') > level_of('mmgcp.nn.low')


@pytest.mark.parametrize('path', FILES, ids=[name_of(path) for path in FILES])
def test_length(path):
    text = path.read_text()
    assert text.count('\n') <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            assert node.end_lineno - first + 1 <= MAX_FUNCTION, node.name
