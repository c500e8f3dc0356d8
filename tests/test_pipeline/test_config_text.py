# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
from mmengine.config import Config

from mmgcp.pipeline.config_text import Code, nest, prefer, render

BASE = """
hooks = [dict(type='A', epoch=1), dict(type='B', inner=dict(steps=[1, 2], other='x')), 'last']
model = dict(depth=1, parts=[dict(width=2), dict(width=3)])
"""


@pytest.fixture
def child(tmp_path):
    """A function that writes changes as a config and returns its text and what it says."""

    def write(changes):
        (tmp_path / 'base.py').write_text(BASE)
        text = render(nest(Config.fromfile(str(tmp_path / 'base.py')), changes))
        (tmp_path / 'child.py').write_text(f"_base_ = './base.py'\n{text}")
        return text, Config.fromfile(str(tmp_path / 'child.py'))

    return write


@pytest.mark.parametrize('changes', [
    {'hooks.0.epoch': 9},
    {'hooks.0.epoch': 9, 'hooks.1.type': 'C', 'hooks.0.new': "it's"},
    {'hooks.1.inner.steps': [5], 'hooks.1.inner.other': None},
    {'model.parts.1.width': 7, 'model.depth': 4},
    {'model.parts.0': dict(height=1), 'model.new.deep': (1, 2)},
    {'hooks': [], 'model.depth': 4},
])
def test_changes_are_those_of_mmengine(child, changes, tmp_path):
    text, cfg = child(changes)
    expected = Config.fromfile(str(tmp_path / 'base.py'))
    expected.merge_from_dict({key: value for key, value in changes.items()
                              if key != 'model.parts.0'})
    if 'model.parts.0' in changes:  # is replaced, where MMEngine would merge
        expected.model.parts[0] = changes['model.parts.0']
    assert cfg.to_dict() == expected.to_dict()
    assert len(text.splitlines()) < 12


def test_elements_that_stay_are_those_of_the_base(child):
    text, _ = child({'hooks.0.epoch': 9})
    assert text == """\
hooks = [
    dict(_base_.hooks[0], epoch=9),
    _base_.hooks[1],
    _base_.hooks[2]]
"""


def test_prefer():
    """The options, and of the others what the options do not say as a whole."""
    settings = {'hooks.0.epoch': 1, 'list': [1], 'train.epochs': 5}
    options = {'hooks': None, 'list.0': 2, 'train.epochs': 7, 'new': 1}
    assert prefer(options, settings) == {
        'hooks': None, 'list': [1], 'train.epochs': 7, 'new': 1}


def test_code_in_lists():
    assert render(dict(a=[Code('*_base_.a'), dict(b='c')])) == (
        "a = [\n    *_base_.a,\n    dict(b='c')]\n")
