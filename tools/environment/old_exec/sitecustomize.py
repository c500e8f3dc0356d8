# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""With this folder on PYTHONPATH, locals() of a function has what exec() has defined there.

So it was before Python 3.13 (PEP 667), and mmcv 2.0's setup.py finds its version like that.
"""
import builtins
import inspect
import sys

_exec, _defined = exec, {}


def exec_in_functions(code, *namespaces, **closure):
    """Execute code; what a function's code defines without namespaces is kept for locals()."""
    frame = sys._getframe(1)
    if not namespaces:
        namespaces = frame.f_globals, frame.f_locals
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # of a function
            namespaces = frame.f_globals, dict(frame.f_locals)
            _defined[frame.f_code] = namespaces[1]
    _exec(code, *namespaces, **closure)


def locals_of_functions():
    """Return what locals() returns, and in functions also what exec() has defined."""
    frame = sys._getframe(1)
    if frame.f_code not in _defined:
        found = frame.f_locals
        return dict(found) if frame.f_code.co_flags & inspect.CO_OPTIMIZED else found
    return {**_defined[frame.f_code], **frame.f_locals}


if sys.version_info >= (3, 13):
    builtins.exec, builtins.locals = exec_in_functions, locals_of_functions
