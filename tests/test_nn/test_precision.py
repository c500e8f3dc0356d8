# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch

from mmgcp.nn.precision import add_products, at_least_single, full_precision, has_setting

CUDNN, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul


def settings():
    """All settings that can be read."""
    found = dict(deterministic=CUDNN.deterministic, benchmark=CUDNN.benchmark)
    for owner, name in ((MATMUL, 'matmul'), (CUDNN, 'cudnn')):
        try:
            found[name] = owner.allow_tf32
        except RuntimeError:
            found[name] = 'set by the newer settings'
    for owner, name in ((MATMUL, 'matmul'), (getattr(CUDNN, 'conv', None), 'conv')):
        if has_setting(owner, 'fp32_precision'):
            found[f'new {name}'] = owner.fp32_precision
    return found


@pytest.fixture(autouse=True)
def restored():
    before = MATMUL.allow_tf32, CUDNN.allow_tf32, CUDNN.benchmark
    yield
    MATMUL.allow_tf32, CUDNN.allow_tf32, CUDNN.benchmark = before


def is_full():
    found = settings()
    return (found['deterministic'] and not found['benchmark']
            and True not in (found['matmul'], found['cudnn'])
            and 'tf32' not in (found.get('new matmul'), found.get('new conv')))


def set_newer():
    MATMUL.fp32_precision = CUDNN.conv.fp32_precision = 'tf32'


def set_newer_of_everything():
    torch.backends.fp32_precision = 'tf32'


def set_older():
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = CUDNN.benchmark = True


@pytest.mark.parametrize('prepare', [lambda: None, set_older, set_newer, set_newer_of_everything])
def test_settings_for_a_while(prepare):
    if 'newer' in prepare.__name__ and not has_setting(MATMUL, 'fp32_precision'):
        pytest.skip('this torch has no newer settings')
    general = getattr(torch.backends, 'fp32_precision', None)
    try:
        prepare()
        before = settings()
        assert not is_full()
        with full_precision():
            assert is_full()
        assert settings() == before
        with pytest.raises(ZeroDivisionError), full_precision():
            raise ZeroDivisionError
        assert settings() == before
    finally:
        if general is not None:
            torch.backends.fp32_precision = general


class OldMatmul:
    """As in torch 2.1, where settings that are missing are no AttributeError."""
    allow_tf32 = True

    def __getattr__(self, name):
        raise AssertionError(f'Unknown attribute {name}')


def test_torch_without_the_newer_settings(monkeypatch):
    old = OldMatmul()
    monkeypatch.setattr(torch.backends.cuda, 'matmul', old)
    with full_precision():
        assert old.allow_tf32 is False and 'fp32_precision' not in vars(old)
    assert old.allow_tf32 is True


def test_no_autocast():
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with torch.autocast('cpu', torch.bfloat16):
        with full_precision():
            assert layer(x).dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16


def test_at_least_single():
    for given, expected in ((torch.half, torch.float), (torch.bfloat16, torch.float),
                            (torch.float, torch.float), (torch.double, torch.double)):
        assert at_least_single(torch.ones(1, dtype=given)).dtype == expected


def test_products_of_single_precision_keep_covariances():
    """Of values that are 10,000 times as large as their deviations."""
    generator = torch.Generator().manual_seed(0)
    inputs, others = (1e4 + torch.randn(300, 2, 3, generator=generator) for _ in range(2))
    sums = torch.zeros(2, 3, 3, dtype=torch.double)
    for part, other in zip(inputs.split(100), others.split(100)):
        add_products(sums, part, other)
    add_products(sums, inputs[:0], others[:0])
    inputs, others = inputs.double().transpose(0, 1), others.double().transpose(0, 1)
    exact = inputs.transpose(1, 2) @ others
    torch.testing.assert_close(sums, exact, rtol=1e-12, atol=0)
    means = 300 * inputs.mean(1)[:, :, None] * others.mean(1)[:, None]
    torch.testing.assert_close(sums - means, exact - means, rtol=0, atol=2e-4)
