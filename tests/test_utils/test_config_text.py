# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Text from data stays text when a config is written and read."""
import time

import pytest
from mmengine.config import Config

from mmgcp.utils.config_text import write_config

TEXTS = ['{{ fileDirname }}', '{{fileBasename}}', '{{$HOME:somewhere}}', "{{'$HOME:x'}}",
         '{{ _base_.model }}', '\\{{ fileDirname }}', '\\x7b{{ fileDirname }}',
         '{{{ fileDirname }}}',
         '{ {fileDirname} }', "it's \"{{ fileDirname }}\"", '犬{{ fileDirname }}', '}}', '{{']


@pytest.mark.parametrize('text', TEXTS)
def test_text_is_not_expanded(text, tmp_path):
    content = dict(metainfo=dict(classes=(text, 'dog')), data_root=text, list=[dict(a=text)])
    write_config(Config(content), tmp_path / 'config.py')
    assert Config.fromfile(tmp_path / 'config.py').to_dict() == content


def test_expanded_by_dump(tmp_path):
    """That is what would happen otherwise."""
    Config(dict(name='{{ fileDirname }}')).dump(tmp_path / 'config.py')
    assert Config.fromfile(tmp_path / 'config.py').name == str(tmp_path)


def test_value_to_expand(tmp_path):
    """Only the whole value is expanded."""
    value, path = '{{ fileDirname }}/weights.pth', tmp_path / 'config.py'
    write_config(Config(dict(load_from=value, name='{{ fileDirname }}', other=value + 's')), path,
                 [value])
    assert Config.fromfile(path).to_dict() == dict(
        load_from=f'{tmp_path}/weights.pth', name='{{ fileDirname }}', other=value + 's')


@pytest.mark.yapf
def test_many_classes(tmp_path):
    """What data sets share is written once, and not laid out, which would take seconds."""
    classes = tuple(f"{{{{ class }}}} '{number}'" for number in range(2000))
    metainfo = dict(classes=classes, palette=[(number % 256, 7, 9) for number in range(2000)])
    few = dict(classes=classes[:3])
    content = dict(train=dict(dataset=dict(metainfo=metainfo, pipeline=[dict(type='A')])),
                   val=dict(datasets=[dict(metainfo=metainfo), dict(metainfo=few)]),
                   test=dict(metainfo=dict(classes=classes)), num_classes=2000)
    begun = time.process_time()
    write_config(Config(content), tmp_path / 'config.py')
    assert time.process_time() - begun < 2
    assert Config.fromfile(tmp_path / 'config.py').to_dict() == content
    text = (tmp_path / 'config.py').read_text()
    assert text.count("'1999'") == 2 and max(map(len, text.splitlines())) < 120
