# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which versions of the other packages mmgcp supports."""
import importlib
import re
from importlib import machinery, metadata, util
from typing import Optional, Tuple

# Package, lowest supported version, first unsupported version (None: there is no upper limit).
# The order matters: a package may only be imported after the packages that it imports.
SUPPORTED_VERSIONS = (
    ('torch', '1.13', None),
    ('mmengine', '0.7.1', '1.0.0'),
    ('mmcv', '2.0.0', '2.1.0'),
    ('mmdet', '3.0.0', '4.0.0'),
    ('mmyolo', '0.5.0', '1.0.0'),
)


def check_versions() -> None:
    """Check that the packages mmgcp builds on are installed in supported versions.

    Raises:
        ImportError: A package is missing, its version is not supported, or mmcv comes
            without its compiled ops.
    """
    for name, lowest, too_new in SUPPORTED_VERSIONS:
        wanted = f'{name}>={lowest}' + (f',<{too_new}' if too_new else '')
        found = _installed_version(name)
        if found is None:
            raise ImportError(_describe_missing(name, wanted))
        number = version_number(found)
        too_old = number < version_number(lowest)
        if too_old or (too_new and number >= version_number(too_new)):
            raise ImportError(f'mmgcp needs {wanted}, but {name} {found} is installed.')
        if name == 'mmcv' and not _has_mmcv_ops():
            raise ImportError(f'mmgcp needs the compiled ops of {wanted}, but the installed '
                              f'mmcv {found} has none (mmcv._ext is missing).')


def version_number(version: str) -> Tuple[int, int, int]:
    """Read a version: ``'2.13.0+cpu'`` is ``(2, 13, 0)``; suffixes such as ``rc1`` are ignored.

    Args:
        version (str): Version of a package.

    Returns:
        tuple[int, int, int]: Major, minor and patch number; those not given are 0.

    Raises:
        ImportError: The version does not begin with a number.
    """
    match = re.match(r'(\d+)(?:\.(\d+))?(?:\.(\d+))?', version)
    if match is None:
        raise ImportError(f'mmgcp cannot read the version {version!r}.')
    major, minor, patch = (int(part or 0) for part in match.groups())
    return major, minor, patch


def _installed_version(name: str) -> Optional[str]:
    """Return the version in the package's metadata, else its ``__version__``, else None."""
    found = _metadata_version(name)
    if found is not None:
        return found
    if util.find_spec(name) is None or (name == 'mmcv' and _metadata_version('mmcv-lite')):
        return None
    return getattr(importlib.import_module(name), '__version__', None)


def _metadata_version(distribution: str) -> Optional[str]:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _describe_missing(name: str, wanted: str) -> str:
    lite = _metadata_version('mmcv-lite') if name == 'mmcv' else None
    if lite:
        return f'mmgcp needs the compiled ops of {wanted}, but mmcv-lite {lite} has none.'
    return f'mmgcp needs {wanted}, but {name} is not installed.'


def _has_mmcv_ops() -> bool:
    """Look for the extension module without importing mmcv."""
    spec = util.find_spec('mmcv')
    if spec is None or spec.submodule_search_locations is None:
        return False
    return machinery.PathFinder.find_spec('_ext', spec.submodule_search_locations) is not None
