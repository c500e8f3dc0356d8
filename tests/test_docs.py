# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the documentation says that can be compared with the code."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmgcp.deployment import ExportOptions
from mmgcp.pruning.options import PruneOptions
from mmgcp.pruning.scores import criterion_names
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.options import options_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'README_zh-CN.md', ROOT / 'CHANGELOG.md',
         ROOT / 'CONTRIBUTING.md', ROOT / 'SECURITY.md',
         *sorted((ROOT / 'docs').glob('*.md'))]
DESIGN = (ROOT / 'docs' / 'design.md').read_text()


@pytest.mark.parametrize('page, options', [
    ('pruning.md', PruneOptions), ('deployment.md', ExportOptions)])
def test_table_of_options(page, options):
    text = (ROOT / 'docs' / page).read_text()
    (table, ) = re.findall(r'<!-- options: .* -->\n(.*?)\n<!-- end of options -->', text, re.S)
    assert table == options_table(options)


def test_table_of_criteria():
    text = (ROOT / 'docs' / 'criteria.md').read_text()
    named = set(re.findall(r'^\| `(\w+)` \|', text, re.M))
    ours = {name for name in criterion_names()
            if TASK_UTILS.get(name).__module__.startswith('mmgcp.')}  # tests register others
    assert ours - {'EqualShares'} == named


def facts_of(page):
    """Code without comments, inline code, links, and numbers in the other texts of a page."""
    text = re.sub(r'^(English \||\[English\]).*$', '', page.read_text(), flags=re.M)
    blocks = re.findall(r'^```\w+\n(.*?)^```$', text, re.S | re.M)
    code = [re.sub(r' *# .*$', '', block, flags=re.M) for block in blocks]
    prose = re.sub(r'^```\w+\n.*?^```$', '', text, flags=re.S | re.M)
    links = set(re.findall(r'\]\(([^)]+)\)', prose))
    prose = re.sub(r'\]\([^)]+\)', ']', prose)
    spans = set(re.findall(r'`([^`]+)`', prose))
    numbers = set(re.findall(r'(?<![\w.])[+-]?\d+(?:\.\d+)?', re.sub(r'`[^`]+`', '', prose)))
    return dict(code=code, links=links, spans={' '.join(span.split()) for span in spans},
                numbers=numbers)


def test_translation_of_the_readme():
    """The same commands, names, links and numbers; and each page links the other."""
    names = 'README.md', 'README_zh-CN.md'
    english, chinese = (facts_of(ROOT / name) for name in names)
    chinese['links'] = {link.replace('_zh.md', '.md') for link in chinese['links']}
    assert english == chinese and len(english['code']) > 5 and len(english['numbers']) > 20
    for name, other in (names, names[::-1]):
        assert f']({other})' in (ROOT / name).read_text().split('\n\n')[1]


def test_translation_of_the_first_steps():
    english, chinese = (facts_of(ROOT / 'docs' / f'get_started{end}.md') for end in ('', '_zh'))
    assert english['code'] == chinese['code']
    assert chinese['spans'] - english['spans'] == {
        'mmgcp.DynamicSparsityHook', 'tools/prune.py CONFIG CHECKPOINT',
        'mmgcp.SpatialAttentionDistiller', 'tools/compress.py CONFIG [CHECKPOINT] --work-dir DIR'}


@pytest.mark.parametrize('page', PAGES, ids=[page.name for page in PAGES])
def test_links_to_files(page):
    for target in re.findall(r'\]\(([^)#:]+?)(?:#[^)]*)?\)', page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize('title, most', [
    ('The path of one channel', 20), ('The path of one block', 6),
    ('The path of one exported file', 10),
    ('The path of one sparsity step', 6),
    ('The path of one distilling step', 7),
    ('The path of one image through a spatial pruner', 6)])
def test_paths_through_the_code(title, most):
    """Each file exists and comes once."""
    section = DESIGN.split(f'## {title}\n')[1].split('\n## ')[0]
    files = re.findall(r'^\| \d+ \| `([^`]+)` \|', section, re.M)
    assert 3 < len(files) <= most and len(set(files)) == len(files)
    assert all((ROOT / name).is_file() for name in files)
    numbers = [int(number) for number in re.findall(r'^\| (\d+) \|', section, re.M)]
    assert numbers == list(range(1, len(files) + 1))


@pytest.mark.slow
def test_site_is_built_without_a_warning(tmp_path):
    for package in ('sphinx', 'myst_parser', 'furo'):  # requirements/docs.txt
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html',
         '-d', str(tmp_path / 'doctrees'), str(ROOT / 'docs'), str(tmp_path / 'site')],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert 'target_flops' in (tmp_path / 'site' / 'api' / 'pruning.html').read_text()


def test_points_of_the_plot_are_in_the_tables():
    """What docs/_static/peers.png is drawn from is what the page says."""
    found = json.loads((ROOT / 'benchmarks/results/peers_yolov5n_320.json').read_text())
    text = (ROOT / 'docs/results.md').read_text()
    section = text[text.index('### After a training'):text.index('## On a GPU')]
    missing = [point for point in found['points'] if f'{point[-1]:.3f}' not in section]
    assert len(found['points']) > 20 and not missing
