# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""One process of a distributed training on the CPU: rank, number of ranks, folder."""
import os
import sys
from pathlib import Path

import torch
from mmengine.model import MMDistributedDataParallel
from test_dynamic_sparsity_hook import TinyModel, make_runner

HOOKS = dict(
    subgradient=dict(rate=0.01, schedule=dict(type='two_phase')),
    proximal=dict(rate=0.2, penalty='proximal', near_zero_thr=0.1,
                  schedule=dict(type='feedback', target=0.4, strength=20)))
ITERS = 5


def batches(rank):
    generator = torch.Generator().manual_seed(1 + rank)
    data = [dict(inputs=torch.randn(1, 4, 4, generator=generator)) for _ in range(2 * ITERS)]
    return torch.utils.data.DataLoader(data, batch_size=2, shuffle=False)


def main():
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    # By hand, as MMEngine's way asks for CUDA
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous',
                                         rank=rank, world_size=world_size)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))
    results = {}
    for name, hook in HOOKS.items():
        model = TinyModel()
        with torch.no_grad():
            model.bn1.weight += rank  # DDP begins with those of rank 0
        runner = make_runner(
            folder / str(rank), dict(hook, histogram_interval=0),
            MMDistributedDataParallel(model), launcher='pytorch', train_dataloader=batches(rank))
        runner.train()
        results[name] = dict(
            weights={key: value.clone() for key, value in model.named_parameters()},
            rate=runner.message_hub.get_scalar('train/sparsity_rate').current())
    torch.save(results, folder / f'{rank}.pth')


if __name__ == '__main__':
    main()
