# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A model that trains in no time, and MMEngine's runner for it."""
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner


class TinyModel(BaseModel):

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.linear(self.norm(inputs)).square().mean())


def tiny_runner(work_dir, hooks=(), **kwargs):
    return Runner(
        TinyModel(),
        work_dir=str(work_dir),
        train_dataloader=torch.utils.data.DataLoader(
            [dict(inputs=torch.tensor([i, 1. - i])) for i in range(4)], batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.1)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, end=3, by_epoch=False),
            dict(type='CosineAnnealingLR', T_max=2, by_epoch=True),
            dict(type='OneCycleLR', eta_max=0.1, total_steps=9, by_epoch=False),
        ],
        custom_hooks=[dict(type='EMAHook', ema_type='ExponentialMovingAverage'), *hooks],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        experiment_name=str(work_dir).replace('/', '_') + str(len(kwargs)),
        **kwargs)
