# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_requirements(name):
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


version = re.search(r"__version__ = '(.+)'", (ROOT / 'mmgcp' / 'version.py').read_text()).group(1)

# torch, mmcv, mmengine, mmdet and mmyolo are deliberately absent: mmgcp is
# installed into an environment that already has them, and mmgcp/__init__.py
# checks their versions.
setup(
    name='mmgcp',
    version=version,
    description='Group channel pruning, dynamic sparse training and spatial attention '
    'distilling for MMYOLO and MMDetection detectors',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmgcp', 'mmgcp.*']),
    python_requires='>=3.8',
    install_requires=read_requirements('runtime'),
    extras_require=dict(pruning=read_requirements('pruning'), tests=read_requirements('tests')),
)
