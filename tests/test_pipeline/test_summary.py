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


def test_a_baseline_that_has_learnt_too_little(tmp_path):
    row = dict(stage='baseline', mAP50=0.059, mAP=0.02, parameters=2e6, macs=1e9, latency_ms=3.)
    rows = [row, dict(row, stage='distilled', mAP50=0.029)]
    summary.write_summary(rows, tmp_path)
    text = (tmp_path / 'summary.md').read_text()
    assert 'finds too little to compare with: mAP50 0.059, below 0.2' in text
    assert 'load_from=CHECKPOINT' in text
    row['mAP50'] = 0.2
    summary.write_summary(rows, tmp_path)
    assert 'too little' not in (tmp_path / 'summary.md').read_text()
