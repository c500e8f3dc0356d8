# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .errors import UserError
from .module_lookup import find_module, find_modules

__all__ = ['UserError', 'find_module', 'find_modules']
