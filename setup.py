# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read(name):
    return (ROOT / name).read_text(encoding='utf-8')


def read_requirements(name):
    lines = read(f'requirements/{name}.txt').splitlines()
    return [line for line in lines if line and not line.startswith('#')]


# requirements/runtime.txt says why torch and the OpenMMLab packages are not required
setup(
    name='mmgcp',
    version=re.search(r"__version__ = '(.+)'", read('mmgcp/version.py')).group(1),
    description='Group channel pruning, dynamic sparse training and spatial attention '
    'distilling for MMYOLO and MMDetection detectors',
    long_description=read('README.md'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmgcp', 'mmgcp.*']),
    python_requires='>=3.8',
    install_requires=read_requirements('runtime'),
    extras_require={name: read_requirements(name) for name in ('pruning', 'deployment', 'tests')},
)
