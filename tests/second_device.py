# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A second device without a GPU: its tensors compute on the CPU, but do not mix with the CPU's.

Inside of ``with SecondDevice():`` tensors and modules can be moved to ``DEVICE``, which is
PyTorch's meta device, but with contents here. What a GPU refuses is refused: functions of tensors
on both devices, except scalars, indices, and copies from one to the other.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device('meta')
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default,
            torch.ops.aten.index_put.default, torch.ops.aten._index_put_impl_.default}


class DeviceTensor(torch.Tensor):
    """A tensor on the second device; ``content`` is on the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, content):
        return torch.Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(),
            storage_offset=content.storage_offset(), dtype=content.dtype, device=DEVICE)

    def __init__(self, content):
        self.content = content

    def __repr__(self):
        return f'DeviceTensor({self.content})'

    def tolist(self):
        return self.content.tolist()

    # PyTorch makes tensors without contents of numbers and lists for the meta device
    def new_tensor(self, data, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype).to(DEVICE)

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index, )
        return super().__getitem__(tuple(
            torch.tensor(item) if isinstance(item, list) else item for item in index))

    def numpy(self):
        raise TypeError('can only convert tensors on the CPU to NumPy')

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Lets functions that take a device know the second one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """Compute a function of tensors on any one device."""
    tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, torch.Tensor)]
    check(func, args, tensors)
    on_device = any(isinstance(item, DeviceTensor) for item in tensors)
    if kwargs.get('device') is not None:
        on_device = torch.device(kwargs['device']) == DEVICE
        kwargs = dict(kwargs, device=torch.device('cpu'))
    results = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    given = {id(unwrapped(item)): item for item in tensors}  # which functions in place return

    def wrap(item):
        if not isinstance(item, torch.Tensor):
            return item
        return given.get(id(item), DeviceTensor(item) if on_device else item)

    return tree_map(wrap, results)


def check(func, args, tensors):
    """Raise an error for tensors on two devices, as PyTorch does."""
    ours = [item for item in tensors if isinstance(item, DeviceTensor)]
    others = [item for item in tensors if not isinstance(item, DeviceTensor) and item.dim()]
    if not ours or not others or func in COPIES:
        return
    if func in INDEXING and isinstance(args[0], DeviceTensor):
        values = args[2:3]
        if not any(item is value for item in others for value in values):
            return
    raise RuntimeError(f'expected all tensors of {func} to be on the same device')


def unwrapped(item):
    return item.content if isinstance(item, DeviceTensor) else item
