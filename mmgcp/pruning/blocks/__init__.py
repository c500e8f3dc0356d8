# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .finding import Block, Blocks, find_blocks
from .removal import AbsentBlocks, ScaledShortcut, blocks_off, remove_blocks

__all__ = ['AbsentBlocks', 'Block', 'Blocks', 'ScaledShortcut', 'blocks_off', 'find_blocks',
           'remove_blocks']
