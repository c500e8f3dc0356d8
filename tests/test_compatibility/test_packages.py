# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Configs that are named mmgcp::..."""
from pathlib import Path

import pytest
from mmengine.config import Config

from mmgcp.errors import UserError
from mmgcp.utils.config import load_config

ROOT = Path(__file__).parents[2]
NAME = 'yolov4/yolov4_n_fast_1xb8-48e_demo-160.py'


def test_they_are_those_of_the_files(tmp_path):
    child = tmp_path / 'child.py'
    child.write_text(f"_base_ = 'mmgcp::{NAME}'\n")
    expected = Config.fromfile(ROOT / 'configs' / NAME).to_dict()
    assert Config.fromfile(child).to_dict() == expected  # nothing has a scope of its own
    assert load_config(str(child)).to_dict() == expected
    assert load_config(f'mmgcp::{NAME}').to_dict() == expected


def test_others_are_as_before(tmp_path):
    child = tmp_path / 'child.py'
    child.write_text("_base_ = 'mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py'\n")
    assert Config.fromfile(child).model['_scope_'] == 'mmyolo'


@pytest.mark.parametrize('name', ['mmgcp::yolov4/none.py', 'mmgcp::none.py'])
def test_missing(name, tmp_path):
    (tmp_path / 'child.py').write_text(f'_base_ = {name!r}\n')
    for path in (name, str(tmp_path / 'child.py')):
        with pytest.raises(UserError, match='needs a file that does not exist.*configs/.*none.py'):
            load_config(path)
