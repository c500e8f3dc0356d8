# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import re
from html.parser import HTMLParser

import cv2
import pytest
from picture_colours import colours, palette

from mmgcp.analysis.network import DrawnLayer, parts_of, plot_network
from mmgcp.analysis.network_html import HEIGHT, write_network_html

LAYERS = [
    DrawnLayer('backbone.stem.conv', 'x', 100, 100, (320, 320)),
    DrawnLayer('backbone.stage.0.conv', 'x', 200, 50, (160, 160)),
    DrawnLayer('neck.reduce', 'y', 200, 100, (160, 160)),
    DrawnLayer('bbox_head.<pred>&', '', 100, 100)]


def test_names():
    assert [layer.part for layer in LAYERS] == ['backbone', 'backbone', 'neck', 'bbox_head']
    assert [layer.short for layer in LAYERS] == ['stem', 'stage.0', 'reduce', '<pred>&']
    assert DrawnLayer('conv', '', 1, 1).short == 'conv'


def test_parts_may_come_again():
    parts = parts_of([LAYERS[2], LAYERS[0], LAYERS[1], LAYERS[2]])
    assert [(part, len(members)) for part, members in parts] == [
        ('neck', 1), ('backbone', 2), ('neck', 1)]


def test_areas(tmp_path):
    """150 channels of one group stay, 100 of another; 250 are removed."""
    plot_network(LAYERS, 'title', tmp_path / 'network.png')
    found = colours(tmp_path / 'network.png')
    legend = 200  # pixels at most
    assert found[palette(0)] / found[palette(1)] == pytest.approx(1.5, rel=0.1)
    assert (found[(0xd8, 0xdd, 0xe3)] - legend) / found[palette(1)] == pytest.approx(2.5, rel=0.1)


@pytest.mark.parametrize('number, rows', [(1, 1), (36, 1), (37, 2), (150, 5)])
def test_rows(tmp_path, number, rows):
    """Long networks get more rows, not a wider picture."""
    plot_network([DrawnLayer(f'backbone.{index}', 'x', 8, 4) for index in range(number)], 'title',
                 tmp_path / 'network.png')
    height, width = cv2.imread(str(tmp_path / 'network.png')).shape[:2]
    assert width < 1600 and height == pytest.approx(120 * (1.2 + rows * 3.0), rel=0.2)


class Page(HTMLParser):
    """The labels, styles and texts of a page, and the addresses that it would load."""

    def __init__(self, text):
        super().__init__()
        self.labels, self.styles, self.texts, self.addresses = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.labels += [attrs['aria-label']] if 'aria-label' in attrs else []
        self.styles += [attrs['style']] if tag == 'span' else []
        self.addresses += [attrs[name] for name in ('src', 'href') if name in attrs]

    def handle_data(self, data):
        self.texts.append(data)


def test_page(tmp_path):
    write_network_html(LAYERS, 'Kept <channels>', tmp_path / 'network.html')
    text = (tmp_path / 'network.html').read_text(encoding='utf-8')
    page = Page(text)
    assert page.labels == [
        'backbone.stem.conv; group x; 100 → 100 channels (100%); 320×320 pixels',
        'backbone.stage.0.conv; group x; 200 → 50 channels (25%); 160×160 pixels',
        'neck.reduce; group y; 200 → 100 channels (50%); 160×160 pixels',
        'bbox_head.<pred>&; not pruned; 100 → 100 channels (100%)']
    heights = [float(re.search(r'height:([\d.]+)px', style).group(1)) for style in page.styles]
    assert heights == [HEIGHT * share for share in (0.5, 0.5, 1, 0.25, 1, 0.5, 0.5, 0.5)]
    assert page.addresses == [] and '@import' not in text and 'url(' not in text
    assert page.texts.count('320×320') == page.texts.count('160×160') == 1  # where it is new
    assert 'Kept <channels>' in page.texts and '<pred>&' in page.texts
