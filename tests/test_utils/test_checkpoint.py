# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn

import mmgcp  # noqa: F401
from mmgcp.errors import UserError
from mmgcp.utils.checkpoint import load_strictly, read_checkpoint


def make_model(channels=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels),
                         nn.Conv2d(channels, 2, 1))


def same_weights(first, second):
    second = second.state_dict()
    return all(torch.equal(value, second[key]) for key, value in first.state_dict().items())


@pytest.fixture
def save(tmp_path):

    def save_checkpoint(content):
        path = str(tmp_path / 'checkpoint.pth')
        torch.save(content, path)
        return path

    return save_checkpoint


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_load(save, prefix):
    source, model = make_model(seed=1), make_model(seed=2)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    assert not same_weights(source, model)
    assert load_strictly(model, save(dict(state_dict=state, meta=dict(epoch=7)))) == dict(epoch=7)
    assert same_weights(source, model)


def test_bare_state_dict(save):
    source, model = make_model(seed=1), make_model(seed=2)
    assert load_strictly(model, save(source.state_dict())) == {}
    assert same_weights(source, model)


def test_counters_of_batch_norm_may_be_missing(save):
    """Checkpoints of old versions of torch are without."""
    source, model = make_model(seed=1), make_model(seed=2)
    state = {key: value for key, value in source.state_dict().items()
             if not key.endswith('num_batches_tracked')}
    load_strictly(model, save(dict(state_dict=state)))
    assert same_weights(source, model)


def assert_refused(model, path, message):
    before = copy.deepcopy(model)
    with pytest.raises(UserError) as caught:
        load_strictly(model, path, 'some.py')
    assert str(caught.value) == message
    assert same_weights(before, model)


def test_wrong_shapes(save):
    path = save(dict(state_dict=make_model(channels=8).state_dict()))
    assert_refused(make_model(), path,
                   f'the checkpoint {path} does not fit some.py: 7 mismatched (0.weight, 0.bias, '
                   '1.weight, ...)')


def test_missing_weights(save):
    state = make_model(seed=1).state_dict()
    del state['2.weight'], state['2.bias']
    path = save(dict(state_dict=state))
    assert_refused(make_model(), path,
                   f'the checkpoint {path} does not fit some.py: 2 missing (2.weight, 2.bias)')


def test_unexpected_weights(save):
    state = make_model(seed=1).state_dict()
    state['3.weight'] = torch.zeros(2)
    path = save(dict(state_dict=state))
    assert_refused(make_model(), path,
                   f'the checkpoint {path} does not fit some.py: 1 unexpected (3.weight)')


def test_all_at_once(save):
    state = make_model(channels=8).state_dict()
    state['neck.weight'] = state.pop('2.bias')
    path = save(dict(state_dict=state))
    assert_refused(make_model(), path,
                   f'the checkpoint {path} does not fit some.py: 1 missing (2.bias); 1 unexpected '
                   '(neck.weight); 7 mismatched (0.weight, 0.bias, 1.weight, ...)')


def test_empty_checkpoint(save):
    path = save({})
    assert_refused(make_model(), path,
                   f'the checkpoint {path} does not fit some.py: 8 missing (0.weight, 0.bias, '
                   '1.weight, ...)')


@pytest.mark.parametrize('name', ['nowhere.pth', ''])
def test_missing_file(tmp_path, name):
    path = str(tmp_path / name)
    assert_refused(make_model(), path, f'there is no checkpoint {path}')


@pytest.mark.parametrize('content', [b'', b'garbage\n' * 9, b'PK\x03\x04 no zip', b'\x80\x02.'])
def test_garbage(tmp_path, content):
    path = tmp_path / 'garbage.pth'
    path.write_bytes(content)
    with pytest.raises(UserError, match='garbage.pth cannot be read as a checkpoint: ') as caught:
        read_checkpoint(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_damaged_checkpoint(save):
    path = save(make_model().state_dict())
    with open(path, 'r+b') as file:
        file.truncate(900)
    with pytest.raises(UserError, match='checkpoint.pth cannot be read as a checkpoint: '):
        read_checkpoint(path)


@pytest.mark.parametrize('content, kind', [([1, 2], 'list'), (torch.zeros(3), 'Tensor')])
def test_no_checkpoint(save, content, kind):
    path = save(content)
    assert_refused(make_model(), path, f'{path} is no checkpoint but a {kind}')


@pytest.mark.parametrize('content', [
    dict(state_dict=[1, 2]), dict(state_dict=None), dict(epoch=3), {0: torch.zeros(2)},
    dict(state_dict={'0.weight': 3})])
def test_dicts_of_something_else(save, content):
    """A user's error, too, whatever is in the file."""
    model = make_model()
    before = copy.deepcopy(model)
    with pytest.raises(UserError):
        load_strictly(model, save(content))
    assert same_weights(before, model)


def test_pickled_code_is_not_run(tmp_path):
    """Loading is weights_only; what a stranger's file would call is refused."""
    path, witness = tmp_path / 'evil.pth', tmp_path / 'witness'

    class Evil:

        def __reduce__(self):
            return (np.savetxt, (str(witness), [1.]))

    path.write_bytes(pickle.dumps(dict(state_dict=Evil()), protocol=2))
    with pytest.raises(UserError):
        read_checkpoint(str(path))
    assert not witness.exists()


@pytest.mark.parametrize('meta, expected', [
    (None, {}), (dict(dataset_meta=None, a=1), dict(a=1)),
    (dict(dataset_meta=dict(classes=('a', ))), dict(dataset_meta=dict(classes=('a', ))))])
def test_meta(save, meta, expected):
    model = make_model()
    assert load_strictly(model, save(dict(state_dict=model.state_dict(), meta=meta))) == expected


@pytest.mark.parametrize('meta, name', [
    ('epoch 3', 'meta'), ([1], 'meta'), ({3: 1}, 'meta'), (torch.ones(2), 'meta'),
    (dict(dataset_meta='voc'), 'dataset_meta'), (dict(dataset_meta={1: 2}), 'dataset_meta')])
def test_meta_of_other_kinds(save, meta, name):
    model = make_model(seed=1)
    path = save(dict(state_dict=model.state_dict(), meta=meta))
    value = meta if name == 'meta' else meta['dataset_meta']
    assert_refused(make_model(), path, f'{name} of the checkpoint {path} must be a dictionary with '
                   f'names as its keys, but is {str(value)[:60]!r}')


@pytest.mark.parametrize('change, kind', [
    (lambda value: value.to_sparse(), 'sparse'), (lambda value: value.to('meta'), 'without values '
                                                  '(on the device meta)'),
    (lambda value: value.to(torch.complex64), 'complex'),
    (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), 'quantized')])
def test_tensors_of_other_kinds(save, change, kind):
    state = make_model(seed=1).state_dict()
    state['2.weight'] = change(state['2.weight'])
    path = save(dict(state_dict=state))
    assert_refused(make_model(), path, f'the checkpoint {path} cannot be used: 2.weight is {kind}, '
                   'but weights are ordinary tensors')


@pytest.mark.parametrize('name, value, problem', [
    ('0.weight', float('nan'), '0.weight has 1 of 108 values that are not finite'),
    ('1.weight', float('inf'), '1.weight has 1 of 4 values that are not finite'),
    ('1.running_mean', float('nan'), '1.running_mean has 1 of 4 values that are not finite'),
    ('1.running_var', -1., '1.running_var has a variance of -1, with which outputs are not '
     'finite')])
def test_values_that_are_not_finite(save, name, value, problem):
    state = make_model(seed=1).state_dict()
    state[name].view(-1)[0] = value
    path = save(dict(state_dict=state))
    assert_refused(make_model(), path, f'the checkpoint {path} cannot be used: {problem}')


def test_nul_in_a_path():
    assert_refused(make_model(), 'a\0b.pth', 'there is no checkpoint a\0b.pth')
