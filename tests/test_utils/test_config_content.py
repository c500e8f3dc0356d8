# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from mmengine.config import Config, ConfigDict

from mmgcp.utils.config_content import plain_content, type_name


def _kinds(value):
    yield type(value)
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list, tuple)):
            yield from _kinds(item)


def test_all_is_plain_with_any_mmengine(monkeypatch):
    """As with MMEngine 0.8, whose to_dict is plain at the top alone: update merges below."""
    content = dict(model=dict(table=dict(a=[1], b=[2]), parts=(dict(c=1), [dict(d=2)])))
    monkeypatch.setattr(Config, 'to_dict', lambda self: dict(self._cfg_dict.items()))
    cfg = Config(content)
    assert ConfigDict in set(_kinds(cfg.to_dict()))
    found = plain_content(cfg)
    assert found == content and set(_kinds(found)) == {dict, list, tuple}
    found['model'].update(table=dict(a=[1]))
    assert found['model']['table'] == dict(a=[1]) and set(cfg.model.table) == {'a', 'b'}


def test_name_of_a_type():
    """As configs have it: a scoped name, a path, or a class."""
    names = 'Config', 'mmengine.Config', 'mmengine.config.Config', Config
    assert [type_name(name) for name in names] == ['Config'] * 4
