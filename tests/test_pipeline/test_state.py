# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json

import pytest

from mmgcp.pipeline.compress import State


@pytest.fixture
def start(tmp_path):
    """A function that runs three steps as the pipeline does and tells which did work."""

    def run(inputs, stop_before=None, stop_in=None):
        state = State(tmp_path / 'state.json')
        worked = []
        for step, value in inputs.items():
            if step == stop_before:
                break
            same = state.enter(step, value)
            if same and state.result(step):
                assert state.result(step) == dict(of=value)
                continue
            worked.append(step)
            if step == stop_in:
                break
            state.finish(step, dict(of=value))
        return worked

    return run


INPUTS = dict(train='a', prune='b', test='c')


def test_same_inputs_are_finished(start):
    assert start(INPUTS) == ['train', 'prune', 'test']
    assert start(INPUTS) == []
    assert start(INPUTS) == []


@pytest.mark.parametrize('step, again', [
    ('train', ['train', 'prune', 'test']), ('prune', ['prune', 'test']), ('test', ['test'])])
def test_changed_input(start, step, again):
    """That step and all later ones are done again, once."""
    start(INPUTS)
    changed = dict(INPUTS, **{step: 'other'})
    assert start(changed) == again
    assert start(changed) == []
    assert start(INPUTS) == again


@pytest.mark.parametrize('step, again', [
    ('train', ['train', 'prune', 'test']), ('prune', ['prune', 'test']), ('test', ['test'])])
def test_interrupted(start, step, again):
    start(INPUTS, stop_in=step)
    assert start(INPUTS) == again


def test_interrupted_after_a_change(start):
    """A later step that was not reached is not taken for finished."""
    start(INPUTS)
    changed = dict(INPUTS, train='other')
    assert start(changed, stop_before='prune') == ['train']
    assert start(changed) == ['prune', 'test']


def test_change_back_in_the_middle(start):
    """What the interrupted step has left is not of the inputs it now has again."""
    start(INPUTS)
    start(dict(INPUTS, train='other'), stop_in='train')
    assert start(INPUTS)[0] == 'train'
    assert start(INPUTS) == []


def test_enter_tells_if_inputs_are_those_of_before(tmp_path):
    """Also for a step that was interrupted, which then resumes."""
    state = State(tmp_path / 'state.json')
    assert not state.enter('train', 'a', 1)
    assert state.result('train') is None
    state = State(tmp_path / 'state.json')
    assert state.enter('train', 'a', 1)
    assert state.result('train') is None
    assert not State(tmp_path / 'state.json').enter('train', 'a', 2)
    assert state.result('never') is None


def test_file(tmp_path):
    state = State(tmp_path / 'state.json')
    state.enter('train', 'a')
    state.finish('train', dict(mAP=0.5))
    record = json.loads((tmp_path / 'state.json').read_text())
    assert record['train']['result'] == dict(mAP=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ['state.json']


def test_begin_anew(start, tmp_path):
    """As when a checkpoint was deleted: that step and those after it are done again."""
    start(INPUTS)
    state = State(tmp_path / 'state.json')
    for step, inputs in list(INPUTS.items())[:2]:
        assert state.enter(step, inputs)
    state.begin_anew('prune')
    assert state.result('train') is not None and state.result('prune') is None
    assert start(INPUTS) == ['prune', 'test']
