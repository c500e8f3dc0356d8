# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import re

import pytest

from mmgcp.errors import PruningError, UserError
from mmgcp.utils.json_files import parse_json, read_text


def test_values():
    text = '{"a": [1, -2.5, null, true, "é", 1234567890123456789012345678901234567890], "b": {}}'
    assert parse_json(text, 'it') == dict(
        a=[1, -2.5, None, True, 'é', 1234567890123456789012345678901234567890], b={})
    assert parse_json('[' * 49 + '1' + ']' * 49, 'it')


@pytest.mark.parametrize('text, message', [
    ('', 'it is not JSON: Expecting value'), ('{"a": ', 'it is not JSON: Expecting value'),
    ('[' * 200000, 'it is nested too deep'), ('{"a":' * 200000, 'it is nested too deep'),
    ('[' * 50 + '1' + ']' * 50, 'it is nested too deep'),
    ('[' + '9' * 5000 + ']', 'it is not JSON: it has a number of 5000 digits'),
    (r'{"a": "\ud800"}', 'it has a text that is not Unicode'),
    (r'{"\udfff": 1}', 'it has a text that is not Unicode')])
def test_what_is_refused(text, message):
    with pytest.raises(PruningError, match=f'^{re.escape(message)}') as caught:
        parse_json(text, 'it', PruningError)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 200


def test_files(tmp_path, monkeypatch):
    path = tmp_path / 'x.json'
    path.write_bytes(b'\xef\xbb\xbf[1]')
    assert read_text(path, 'the file') == '[1]'
    path.write_bytes(b'\x80\x81')
    cases = [(path, 'is not JSON: it is no text in UTF-8'),
             (tmp_path, 'cannot be read: Is a directory'),
             (tmp_path / 'no', 'cannot be read: No such file'),
             ('a\0b', 'cannot be read: embedded')]
    for source, message in cases:
        with pytest.raises(UserError, match=f'^the file .* {message}'):
            read_text(source, 'the file')
    monkeypatch.setattr('mmgcp.utils.json_files.MAX_BYTES', 1)
    with pytest.raises(UserError, match='is larger than 0 MiB'):
        read_text(path, 'the file')
