# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM = ('configs', 'tools', 'model-index.yml')  # what OpenMMLab's packages carry as PACKAGE/.mim


def read(name):
    return (ROOT / name).read_text(encoding='utf-8')


def read_requirements(name):
    lines = read(f'requirements/{name}.txt').splitlines()
    return [line for line in lines if line and not line.startswith('#')]


class BuildWithMim(build_py):
    """Takes configs and tools along, unless the package is used in place."""

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        folder = Path(self.build_lib) / 'mmgcp' / '.mim'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in MIM:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name,
                                ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(ROOT / name, folder / name)


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
    package_data=dict(mmgcp=['py.typed']),
    cmdclass=dict(build_py=BuildWithMim),
    entry_points=dict(console_scripts=[
        f'mmgcp-{tool} = mmgcp.console:main'
        for tool in ('compress', 'export', 'prune', 'test', 'train')]),
    python_requires='>=3.8',
    install_requires=read_requirements('runtime'),
    extras_require={name: read_requirements(name) for name in ('pruning', 'deployment', 'tests')},
)
