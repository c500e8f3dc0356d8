# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Loading checkpoints from wherever MMEngine finds them, without running what is in them."""
import _compat_pickle
import functools
import io
import pickle
import re
import types
import zipfile
from collections import Counter
from contextlib import contextmanager
from typing import Any, Dict, Iterator

from mmgcp.errors import UserError

from .checkpoints import checkpoint_globals
from .versions import version_number

# How torch and the unpickler below name what they refuse
REFUSED = re.compile(
    r"GLOBAL ([\w.]+)|(?:unrecognized function|but got) <?(?:class|function|built-in function)? ?"
    r"'?([\w.]+)")
TORCHSCRIPT = 'it is TorchScript, which is a program'


def load_weights_only() -> bool:
    """Let MMEngine's loader read checkpoints, of whatever scheme, without running code in them.

    MMEngine 0.10 asks torch to unpickle anything that comes from a URL, and torch before 2.6
    does so with files, too. Now all that :class:`CheckpointLoader` reads is ``weights_only``,
    plus what :func:`allow_mmengine_checkpoints` lists, with every version of torch. What cannot
    be read is a UserError that says why; errors of the system and the network stay as they are.

    Returns:
        bool: Whether the loader was changed.
    """
    from mmengine.runner.checkpoint import CheckpointLoader
    original = CheckpointLoader.load_checkpoint.__func__
    if hasattr(original, '__wrapped__'):
        return False

    @functools.wraps(original)
    def load_checkpoint(cls: type, filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            with weights_only():
                return original(cls, filename, *args, **kwargs)
        except (UserError, OSError):
            raise
        except Exception as error:  # pickle, zipfile and torch raise errors of many kinds
            reason = 'there is no such model' if _is_unknown(filename, error) else explain(error)
            raise UserError(f'{filename} cannot be read as a checkpoint: {reason}') from error

    CheckpointLoader.load_checkpoint = classmethod(load_checkpoint)
    return True


@contextmanager
def weights_only() -> Iterator[None]:
    """Keep ``torch.load`` from running code in files inside the block, whoever calls it."""
    import torch
    if version_number(torch.__version__) < (2, 6, 0):
        with safe_pickle_only():
            yield
        return
    original = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **dict(kwargs, weights_only=True))

    torch.load = load
    try:
        yield
    finally:
        torch.load = original


@contextmanager
def safe_pickle_only() -> Iterator[None]:
    """Do the same with a torch before 2.6, which cannot be told of MMEngine's classes.

    Its own ``weights_only`` would refuse them, and version 1.13 ignores a ``pickle_module`` that
    it is given; so the module that it takes by default is replaced.
    """
    import torch
    original, original_pickle = torch.load, torch.serialization.pickle

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_programs(file)
        return original(file, *args, **dict(kwargs, weights_only=False, pickle_module=None))

    torch.load = load  # type: ignore[assignment]
    torch.serialization.pickle = safe_pickle()
    try:
        yield
    finally:
        torch.load, torch.serialization.pickle = original, original_pickle


def _is_unknown(filename: str, error: Exception) -> bool:
    """Whether a scheme of model names, such as ``openmmlab://``, does not have a name."""
    return isinstance(error, KeyError) and error.args == (filename.partition('://')[2], )


def explain(error: Exception) -> str:
    """Return in a few words why a checkpoint could not be read.

    Torch's own words are left out where they advise to load it anyway, or tell nothing.
    """
    text = ' '.join(str(error).split())
    found = REFUSED.search(text)
    if found:
        return (f'it refers to {found.group(1) or found.group(2)}, which is not loaded, as that '
                'could run code; a checkpoint has tensors, numbers and texts, and of a model '
                'its state_dict() alone')
    if 'TorchScript' in text:
        return TORCHSCRIPT
    if not isinstance(error, (RuntimeError, ImportError)) or 'eights' in text:
        return 'it is not a file of torch.save, or is damaged'
    return text.split('. ')[0][:200]


def _refuse_programs(file: Any) -> None:
    """Raise an UnpicklingError for a file, or an open one, of TorchScript."""
    names = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
    if 'constants.pkl' in [name.rpartition('/')[2] for name in names]:
        raise pickle.UnpicklingError(TORCHSCRIPT)
    if hasattr(file, 'seek'):
        file.seek(0)


@functools.lru_cache(maxsize=None)
def safe_pickle() -> types.ModuleType:
    """Make a replacement of the module ``pickle``, which unpickles by :class:`SafeUnpickler`."""
    module = types.ModuleType('mmgcp_safe_pickle')
    vars(module).update((name, value) for name, value in vars(pickle).items()
                        if not name.startswith('__'))
    vars(module).update(
        Unpickler=SafeUnpickler,
        load=lambda file, **options: SafeUnpickler(file, **options).load(),
        loads=lambda data, **options: SafeUnpickler(io.BytesIO(data), **options).load())
    return module


# The Unpickler in Python of the standard library, of which type checkers know little
_Unpickler: Any = getattr(pickle, '_Unpickler')  # noqa: B009


class SafeUnpickler(_Unpickler):
    """Loads what ``weights_only`` of today's torch loads, and what MMEngine's checkpoints need."""

    dispatch = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function of the list; UnpicklingError for any other."""
        if self.proto < 3:  # with the names of Python 2
            module, name = _compat_pickle.NAME_MAPPING.get(
                (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name))
        found = _allowed_globals().get(f'{module}.{name}')
        if found is None:
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name} is not allowed')
        return found

    def load_build(self) -> None:
        """Set the state of an object, but never attributes of a class or a function."""
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError('the state of a class or function must not be set')
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


@functools.lru_cache(maxsize=None)
def _allowed_globals() -> Dict[str, Any]:
    from _codecs import encode

    import torch
    from torch._weights_only_unpickler import _get_allowed_globals
    found = {'_codecs.encode': encode, 'builtins.set': set, 'builtins.bytearray': bytearray,
             'builtins.complex': complex, 'collections.Counter': Counter,
             'torch.device': torch.device, **_get_allowed_globals()}
    found.update((str(item), item) for item in vars(torch).values()
                 if isinstance(item, (torch.dtype, torch.qscheme)))
    for name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter',
                 '_rebuild_qtensor'):
        found[f'torch._utils.{name}'] = getattr(torch._utils, name)
    found.update((name, item) for item, name in checkpoint_globals())
    return found
