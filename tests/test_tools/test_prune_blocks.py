# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""tools/prune.py --remove-blocks, and what stock tools make of its results."""
import json

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from numpy import zeros
from scripts import complaint_of, output_of, pruned_weights, write_pruning_files

from mmgcp.pruning import PruningPlan
from mmgcp.utils.config import build_detector, load_config

FIRST, SECOND = 'backbone.stage3.1.blocks.0', 'backbone.stage4.1.blocks.1'


@pytest.fixture(scope='module')
def blocks_folder(config_files, tmp_path_factory):
    """What the tool writes for two named blocks and fewer channels."""
    folder = tmp_path_factory.mktemp('blocks') / 'out'
    printed = output_of('prune.py', *config_files, '--work-dir', folder, '--remove-blocks', FIRST,
                        SECOND, '--target-flops', 0.6, '--round-to', 1)
    assert f'2 blocks removed: {FIRST}, {SECOND}' in printed
    return folder


def test_stock_tools_rebuild_it(blocks_folder):
    cfg = load_config(str(blocks_folder / 'pruned.py'))
    assert cfg.model.absent_blocks == {FIRST: None, SECOND: None}
    assert not any(name.startswith((FIRST, SECOND)) for name in cfg.model.channels)
    weights = pruned_weights(blocks_folder)
    assert not any(key.startswith((FIRST, SECOND)) for key in weights)
    assert any(key.startswith('backbone.stage4.1.blocks.2') for key in weights)
    detector = init_detector(str(blocks_folder / 'pruned.py'), str(blocks_folder / 'pruned.pth'),
                             device='cpu')
    assert list(detector.state_dict()) == list(weights)
    assert inference_detector(detector, zeros((64, 64, 3), 'uint8')).pred_instances is not None


def test_reports(blocks_folder):
    report = json.loads((blocks_folder / 'report.json').read_text())
    assert [block['name'] for block in report['blocks'] if block['removed']] == [FIRST, SECOND]
    assert report['macs']['after'] == pytest.approx(0.6 * report['macs']['before'], rel=0.011)
    text = (blocks_folder / 'report.md').read_text()
    assert f'## Removed blocks\n\n- {FIRST}\n- {SECOND}\n' in text
    assert f'| {FIRST}.conv1.conv |  | ' in text


def test_the_plan_shows_blocks_and_can_be_edited(blocks_folder, config_files, tmp_path):
    lines = (blocks_folder / 'plan.json').read_text().splitlines()
    line, = (number for number, text in enumerate(lines) if f'"name": "{SECOND}", "kind"' in text)
    assert '"removed": true' in lines[line]
    lines[line] = lines[line].replace('"removed": true', '"removed": false')
    (tmp_path / 'edited.json').write_text('\n'.join(lines))
    output_of('prune.py', *config_files, '--work-dir', tmp_path / 'out', '--plan',
              tmp_path / 'edited.json')
    assert PruningPlan.load(tmp_path / 'out/plan.json').removed_blocks == [FIRST]
    assert any(key.startswith(SECOND) for key in pruned_weights(tmp_path / 'out'))


def test_pruned_again(blocks_folder, tmp_path):
    third = 'backbone.stage2.1.blocks.0'
    output_of('prune.py', blocks_folder / 'pruned.py', blocks_folder / 'pruned.pth', '--work-dir',
              tmp_path / 'out', '--remove-blocks', third, '--ratio', 0.2, '--round-to', 1)
    cfg = load_config(str(tmp_path / 'out/pruned.py'))
    assert cfg.model.absent_blocks == {FIRST: None, SECOND: None, third: None}
    model = build_detector(cfg)
    model.load_state_dict(pruned_weights(tmp_path / 'out'), strict=True)


def test_children_of_its_config(blocks_folder, tmp_path):
    """Other classes; and the table and the blocks in the place of a path."""
    (tmp_path / 'child.py').write_text(
        f'_base_ = {str(blocks_folder / "pruned.py")!r}\n'
        'model = dict(bbox_head=dict(head_module=dict(num_classes=7)))\n')
    model = build_detector(load_config(str(tmp_path / 'child.py')))
    assert isinstance(model.get_submodule(FIRST), torch.nn.Identity)
    assert model.bbox_head.head_module.num_classes == 7
    cfg = load_config(str(blocks_folder / 'pruned.py'))
    del cfg.model['absent_blocks']
    cfg.model.channels = str(blocks_folder / 'pruned.py')
    assert isinstance(build_detector(cfg).get_submodule(SECOND), torch.nn.Identity)


def test_exported(blocks_folder, tmp_path):
    pytest.importorskip('onnxruntime')
    printed = output_of('export.py', blocks_folder / 'pruned.py', blocks_folder / 'pruned.pth',
                        tmp_path / 'out.onnx', '--input-size', 64, 64, '--val-images', 0)
    assert (tmp_path / 'out.onnx').exists() and 'out.onnx' in printed


def test_wrong_blocks(config_files, tmp_path):
    arguments = (*config_files, '--work-dir', tmp_path / 'out')
    found = complaint_of('prune.py', *arguments, '--remove-blocks', 'backbone.stage9')
    assert ("the detector has no block 'backbone.stage9' that can be removed: there are "
            'backbone.stage1.1.blocks.0') in found
    found = complaint_of('prune.py', *arguments, '--remove-blocks', 2, '--calib-batches', 0)
    assert 'remove_blocks=2 needs training data to choose blocks by' in found
    assert not (tmp_path / 'out').exists()
    cfg = load_config(str(config_files[0]))
    cfg.model.update(type='mmgcp.PrunedDetector', detector='YOLODetector', channels={},
                     absent_blocks={'backbone.stage9': None})
    cfg.dump(str(tmp_path / 'wrong.py'))
    found = complaint_of('prune.py', tmp_path / 'wrong.py', config_files[1])
    assert "the detector has no block 'backbone.stage9' that could be absent" in found


@pytest.mark.parametrize('wanted', [(1, ), ('auto', '--target-flops', 0.7, '--round-to', 1,
                                            '--allocation', 'uniform')])
def test_blocks_are_chosen(wanted, write_config, tmp_path):
    files = write_pruning_files(write_config(tmp_path / 'tiny.py'))
    printed = output_of('prune.py', *files, '--work-dir', tmp_path / 'out', '--remove-blocks',
                        *wanted, '--calib-batches', 1, '--val-images', 0)
    plan = PruningPlan.load(tmp_path / 'out/plan.json')
    if wanted[0] == 1:
        assert len(plan.removed_blocks) == 1
    else:
        assert 'loss by the number of removed blocks: 0: ' in printed
        assert len(plan.removed_blocks) < len(plan.options['depth']) + 1
