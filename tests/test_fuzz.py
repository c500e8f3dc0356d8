# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A seeded thousand of mutated files; fuzz_files.py reads as many as one likes."""
import pytest
from fuzz_files import Darknet, Plans, fuzz


@pytest.mark.parametrize('kind, number', [(Darknet, 400), (Plans, 600)])
def test_mutated_files(kind, number):
    counts, wrong = fuzz(kind, number, seed=1)
    assert not wrong, '\n'.join(wrong[:5])
    assert min(counts['accepted'], counts['refused']) > number // 50
    assert sum(counts.values()) == number


def test_the_fuzzer_sees_errors_and_slow_files(monkeypatch):
    """The test above can fail."""
    monkeypatch.setattr('fuzz_files.MAX_SECONDS', -1.)
    assert fuzz(Plans, 2, seed=0)[1]
    monkeypatch.setattr('fuzz_files.MAX_SECONDS', 100.)
    monkeypatch.setattr(Plans, 'read', lambda files: 1 / files.file.read_text().count('"units"'))
    assert 'ZeroDivisionError' in ''.join(fuzz(Plans, 200, seed=0)[1])
