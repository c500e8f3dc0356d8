# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import logging
import os

import pytest
import torch
from mmengine.model import BaseModel

from mmgcp.errors import UserError
from mmgcp.utils.checked_runner import CheckedRunner


class TinyModel(BaseModel):

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(2, 3)
        self.second = torch.nn.Linear(3, 1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.second(self.first(inputs)).square().mean())


@pytest.fixture
def train(tmp_path):
    """A function that trains for an iteration from a checkpoint: the runner and its log."""

    def run(checkpoint):
        torch.save(checkpoint, tmp_path / 'start.pth')
        runner = CheckedRunner(
            TinyModel(), work_dir=str(tmp_path),
            train_dataloader=torch.utils.data.DataLoader([dict(inputs=torch.ones(2))]),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.)),
            custom_hooks=[dict(type='EMAHook')], default_hooks=dict(checkpoint=None),
            load_from=str(tmp_path / 'start.pth'),
            experiment_name=f'checked-{os.path.basename(tmp_path)}')
        records = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record)
        runner.logger.addHandler(handler)
        runner.train()
        return runner, [record.getMessage() for record in records
                        if record.levelno == logging.WARNING]

    return run


def test_all_weights_fit(train):
    state = TinyModel().state_dict()
    runner, warnings = train(dict(state_dict=state, meta={}))
    assert torch.equal(runner.model.first.weight, state['first.weight'])
    assert not any('does not fit' in text for text in warnings)


def test_bare_state_dict(train):
    """MMEngine's hook for averaged weights would end in a KeyError."""
    state = {f'module.{name}': value for name, value in TinyModel().state_dict().items()}
    runner, warnings = train(state)
    assert torch.equal(runner.model.first.weight, state['module.first.weight'])
    assert not any('does not fit' in text for text in warnings)


def test_some_weights_do_not_fit(train):
    state = TinyModel().state_dict()
    state['second.weight'] = torch.ones(2, 3)
    state['third.weight'] = state.pop('second.bias')
    runner, warnings = train(dict(state_dict=state))
    assert torch.equal(runner.model.first.weight, state['first.weight'])
    (text, ) = [text for text in warnings if 'does not fit' in text]
    assert 'training starts from 2 of 4 weights' in text
    for line in ('1 missing (second.bias)', '1 unexpected (third.weight)',
                 '1 mismatched (second.weight)'):
        assert f'\n  {line}\n' in text


def test_no_weight_fits(train):
    with pytest.raises(UserError, match='none of the weights of .*start.pth fits the model'):
        train(dict(state_dict={'layer.weight': torch.ones(1)}))
