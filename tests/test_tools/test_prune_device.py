# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""tools/prune.py --device."""
import pytest
import torch
from mmengine.config import Config
from mmengine.utils import digit_version
from pruning_samples import randomise
from scripts import complaint_of, pruned_weights, run_here
from second_device import DEVICE, SecondDevice

from mmgcp.pruning import PruningPlan
from mmgcp.utils.config import build_detector


@pytest.fixture(scope='module')
def files(write_config, tmp_path_factory):
    """Config and checkpoint of a tiny detector with data."""
    folder = tmp_path_factory.mktemp('device')
    config = write_config(folder / 'tiny.py')
    model = randomise(build_detector(Config.fromfile(config)))
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'tiny.pth')
    return config, folder / 'tiny.pth'


@pytest.mark.slow
@pytest.mark.skipif(digit_version(torch.__version__) < digit_version('2.1'),
                    reason='torch is too old')
def test_written_from_another_device(files, tmp_path, monkeypatch):
    """On the second device everything is computed, as on the CPU; the checkpoint is on the CPU."""
    options = ['--target-params', 0.6, '--criterion', 'Taylor', '--calib-batches', 2,
               '--input-size', 96, 96, '--val-images', 0]  # NMS does not run on the second one
    result = run_here('prune.py', *files, *options, '--device', 'cpu', '--work-dir',
                      tmp_path / 'cpu')
    assert result.returncode == 0, result.stderr
    devices = []

    def find(name):
        devices.append(name)
        return DEVICE

    monkeypatch.setattr('mmgcp.utils.devices.find_device', find)
    with SecondDevice():
        result = run_here('prune.py', *files, *options, '--device', 'second', '--work-dir',
                          tmp_path / 'second')
    assert result.returncode == 0, result.stderr
    assert devices == ['second']
    expected, found = pruned_weights(tmp_path / 'cpu'), pruned_weights(tmp_path / 'second')
    assert list(found) == list(expected)
    for name, value in found.items():
        assert type(value) is torch.Tensor and value.device.type == 'cpu'
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    plans = [PruningPlan.load(tmp_path / name / 'plan.json') for name in ('cpu', 'second')]
    assert plans[0].units == plans[1].units


@pytest.mark.parametrize('options, message', [
    (['--device', 'gpu'], "'gpu' is not the name of a device"),
    (['--device', 'meta'], 'there is no device meta here'),
    (['--device', 'cpu', '--launcher', 'slurm'], 'need --launcher pytorch'),
])
def test_no_such_device(options, message, tmp_path):
    """It is said before the config is read."""
    assert message in complaint_of('prune.py', tmp_path / 'absent.py', 'absent.pth', *options)
