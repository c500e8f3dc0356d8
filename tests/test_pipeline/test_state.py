# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json

import pytest

from mmgcp.errors import UserError
from mmgcp.pipeline.state import State


@pytest.fixture
def start(tmp_path):
    """A function that runs three steps as the pipeline does and tells which did work."""

    def run(inputs, stop_before=None, stop_in=None, files=()):
        state = State(tmp_path / 'state.json')
        worked = []
        for step, value in inputs.items():

            def work(step=step, value=value):
                worked.append(step)
                if step == stop_in:
                    raise KeyboardInterrupt
                return dict(of=value)

            if step == stop_before:
                break
            try:
                left = [tmp_path / name for name in files if name.startswith(step)]
                assert state.run(step, value, work, left) == dict(of=value)
            except KeyboardInterrupt:
                break
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


def test_what_other_inputs_have_left_is_cleared(tmp_path):
    """A step that was begun with the same inputs can go on, and keeps it."""
    begun, cleared = [], []

    def work():
        begun.append(not cleared)
        raise KeyboardInterrupt

    for inputs in ('a', 'a', 'b', 'b', 'a'):
        cleared.clear()
        with pytest.raises(KeyboardInterrupt):
            State(tmp_path / 'state.json').run('train', inputs, work,
                                               clear=lambda: cleared.append(True))
    assert begun == [False, True, False, True, False]


def test_interrupted_while_it_is_cleared(tmp_path):
    """Then the step has not begun, and what was not cleared is not of it."""
    cleared = []

    def clear():
        cleared.append(True)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            State(tmp_path / 'state.json').run('train', 'a', dict, clear=clear)
    assert cleared == [True, True]


@pytest.mark.parametrize('text', [
    b'', b'{', b'null', b'[]', b'3', b'{"train": 3}', b'{"train": {}}', b'{"train": {"inputs": 1}}',
    b'{"train": {"inputs": "a", "result": []}}', b'\xff\xfe', b'[' * 200000, b'\0'])
def test_broken_file(tmp_path, text):
    """It is left as it is: the checkpoints of the stages may be worth hours."""
    path = tmp_path / 'state.json'
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        State(path)
    assert str(caught.value).startswith(f'{path} does not say which stages are finished (')
    assert str(caught.value).endswith('); delete it to begin with the first one')
    assert '\n' not in str(caught.value) and path.read_bytes() == text


def test_file(tmp_path):
    State(tmp_path / 'state.json').run('train', 'a', lambda: dict(mAP=0.5))
    record = json.loads((tmp_path / 'state.json').read_text())
    assert record['train']['result'] == dict(mAP=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ['state.json']


def test_deleted_file(start, tmp_path):
    """The step that leaves it and those after it are done again."""
    files = ['train.pth', 'prune.py', 'prune.pth']
    for name in files:
        (tmp_path / name).touch()
    assert start(INPUTS, files=files) == ['train', 'prune', 'test']
    assert start(INPUTS, files=files) == []
    (tmp_path / 'prune.pth').unlink()
    assert start(INPUTS, files=files) == ['prune', 'test']
