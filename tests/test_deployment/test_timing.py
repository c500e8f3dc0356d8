# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn

from mmgcp.deployment.timing import (
    RUNTIMES,
    check_runtime,
    installed_runtimes,
    layer_run,
    speedups,
    take_turns,
)
from mmgcp.errors import UserError


def test_turns_change_direction_and_warm_up_is_not_timed():
    calls = []
    times = take_turns([lambda: calls.append('a'), lambda: calls.append('b')], 2, warmup=1)
    assert ''.join(calls) in ('abbaab', 'baabba')
    assert [len(item) for item in times] == [2, 2]


def test_time_is_what_this_process_computes(monkeypatch):
    clock = iter([1., 1.5, 2., 2.25])
    monkeypatch.setattr('mmgcp.deployment.timing.time.process_time', lambda: next(clock))
    assert take_turns([lambda: None], 2, warmup=0) == [[500., 250.]]


def test_ratios_of_rounds_not_of_medians():
    assert speedups([[10., 30., 20.], [5., 10., 40.]]) == [1., 2.]


def test_runtimes(monkeypatch):
    with pytest.raises(UserError, match="must be one of onnxruntime, .*, but is 'tensorrt'"):
        check_runtime('tensorrt')
    monkeypatch.setattr('mmgcp.deployment.exported.is_installed', lambda name: name == 'onnx')
    with pytest.raises(UserError, match='^openvino is needed to measure times in openvino: pip'):
        check_runtime('openvino')
    assert 'torch' in installed_runtimes()
    check_runtime('torch')


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('layer, shape', [
    (nn.Conv2d(4, 6, 3, 2, 1), (4, 9, 8)), (nn.ConvTranspose2d(4, 6, 2, 2), (4, 5, 5)),
    (nn.Linear(4, 6), (4, 7)), (nn.Linear(4, 6), (4, )), (nn.Conv2d(6, 6, 3, groups=6), (6, 9, 8))])
def test_layers_run_in_all_programs(runtime, layer, shape):
    if runtime not in installed_runtimes():
        pytest.skip(f'{runtime} is not installed')
    outputs = layer_run(layer, shape, runtime)()
    outputs = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    moved = shape if not isinstance(layer, nn.Linear) else (*shape[1:], shape[0])
    images = torch.rand(1, *moved, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(outputs, layer(images), atol=1e-5)
