# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from mmgcp.analysis import count_complexity
from mmgcp.pipeline import summary
from mmgcp.pipeline.summary import measure_stages
from mmgcp.utils.detectors import load_detector


def test_stages_take_turns(config_files, pruned_folder, monkeypatch):
    """All stages are in one comparison, with their own weights, and without exporting."""
    compared = []

    def compare(entries, options, exported):
        assert (options.val_images, options.threads, exported) == (0, 1, False)
        compared.append([entry.origin['checkpoint'] for entry in entries])
        return original(entries, options, exported)

    original = summary.compare
    monkeypatch.setattr(summary, 'compare', compare)
    configs = [config_files[0], pruned_folder / 'pruned.py']
    checkpoints = [str(config_files[1]), str(pruned_folder / 'pruned.pth')]
    rows = measure_stages(configs, checkpoints)
    assert compared == [checkpoints]
    for row, config, checkpoint in zip(rows, configs, checkpoints):
        model = load_detector(str(config), checkpoint).model
        assert (row['parameters'], row['macs']) == count_complexity(model, (3, 320, 320))
        assert set(row) == {'parameters', 'macs', 'latency_ms'} and row['latency_ms'] > 0
