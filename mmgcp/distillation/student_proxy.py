# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Any, Iterator, Optional, Set, Tuple

import torch.nn as nn
from mmengine.model import BaseModel

ADAPTERS = 'distill_adapters'


class StudentProxy(BaseModel):
    """Base of models that train a student and are the student to everything else.

    The two objects share the dictionaries in which ``nn.Module`` keeps its modules, parameters
    and buffers. So the proxy has those of the student under their own names, its checkpoints
    are checkpoints of the student, and a module that is replaced in one of them is replaced in
    the other. Copying and pickling preserve this.

    Adapters are modules that are trained, but do not belong to the student. They appear in
    ``named_modules()`` and ``named_children()``, so that optimizers, moves to a device and
    distributed training find them. They are not in ``state_dict()``.

    Modules that are neither must be set with ``object.__setattr__``, or the student would own
    them.

    Args:
        student (BaseModel): The model to train.
    """

    def __init__(self, student: BaseModel):
        super().__init__(data_preprocessor=student.data_preprocessor)
        for name in ('_modules', '_parameters', '_buffers', '_non_persistent_buffers_set'):
            self.__dict__[name] = student.__dict__[name]
        object.__setattr__(self, 'student', student)
        self.set_adapters(nn.ModuleList())

    def set_adapters(self, adapters: nn.ModuleList) -> None:
        """Set the adapters, which are called ``distill_adapters``."""
        object.__setattr__(self, ADAPTERS, adapters)

    def has_adapters(self) -> bool:
        """Whether there is any adapter."""
        return len(self.__dict__.get(ADAPTERS, ())) > 0

    def init_weights(self) -> None:
        """Initialise the student."""
        self.student.init_weights()

    def train(self, mode: bool = True) -> 'StudentProxy':
        """Set the mode of the student."""
        self.training = mode
        self.student.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        """The student's attributes where the proxy has none of that name."""
        student = self.__dict__.get('student')
        if student is None:  # while the proxy is built or copied
            return super().__getattr__(name)
        return getattr(student, name)

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        self.student._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.student._load_from_state_dict(*args, **kwargs)

    def named_modules(self,
                      memo: Optional[Set[nn.Module]] = None,
                      prefix: str = '',
                      remove_duplicate: bool = True) -> Iterator[Tuple[str, nn.Module]]:
        """The student's modules and, after them, the adapters if there are any."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        if self.has_adapters():
            name = f'{prefix}.{ADAPTERS}' if prefix else ADAPTERS
            yield from self.distill_adapters.named_modules(memo, name, remove_duplicate)

    def named_children(self) -> Iterator[Tuple[str, nn.Module]]:
        """The student's children and the adapters if there are any."""
        yield from super().named_children()
        if self.has_adapters():
            yield ADAPTERS, self.distill_adapters

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        """Add a module to the student.

        Functions that convert a model, as to synchronised BatchNorm, put each child back with
        this method. The adapters must stay outside of the student then.
        """
        if name == ADAPTERS:
            self.set_adapters(module)
        else:
            super().add_module(name, module)
