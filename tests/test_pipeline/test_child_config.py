# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
from mmengine.config import Config

from mmgcp.pipeline.child_config import write_child

BASE = """
hooks = [dict(type='A', epoch=1), dict(type='B', inner=dict(steps=[1, 2], other='x')), 'last']
model = dict(depth=1, parts=[dict(width=2), dict(width=3)], neck=dict(type='C', size=(1, 2)))
loader = None
"""


@pytest.mark.parametrize('changes', [
    {},
    {'model.parts.0.width': '{{ fileDirname }}', 'model.neck.type': '{{$HOME:x}}'},
    {'hooks.0.epoch': 9, 'hooks.1.type': 'C', 'hooks.0.new': "it's"},
    {'hooks.1.inner.steps': [5], 'hooks.1.inner.other': None},
    {'model.parts.1.width': 7, 'model.depth': 4},
    {'model.neck._delete_': True, 'model.neck.type': 'D'},
    {'model._delete_': True, 'model.neck': dict(type='C')},
    {'model.neck': None, 'model.parts': [], 'model.depth': dict(_delete_=True, of='a')},
    {'model.neck.size': [1, 2], 'model.new.deep': (1, (2, 'b')), 'new': dict(size=(), share=0.5)},
    {'loader': dict(_delete_=True, size=1), 'hooks': dict(_delete_=True, type='A')},
])
@pytest.mark.parametrize('absolute', [True, False])
@pytest.mark.yapf
def test_written_and_read(tmp_path, changes, absolute):
    """The child amounts to what was to be written, but holds only the changes."""
    (tmp_path / 'base.py').write_text(BASE)
    wanted = Config.fromfile(str(tmp_path / 'base.py'))
    wanted.merge_from_dict(copy.deepcopy(changes))
    base = str(tmp_path / 'base.py') if absolute else './base.py'
    write_child(tmp_path / 'child.py', base, lambda _: wanted)
    assert Config.fromfile(str(tmp_path / 'child.py')).to_dict() == wanted.to_dict()
    text = (tmp_path / 'child.py').read_text()
    assert text.splitlines()[0] == f'_base_ = {base!r}'
    changed = {key.split('.')[0] for key in changes}
    assert {line.split(' = ')[0] for line in text.splitlines() if ' = ' in line} == {
        '_base_', *changed}
