# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Several processes (ranks) that prune the same model: sharing batches, joining what they found.

Item i of all belongs to rank i modulo the number of ranks, so item k of a rank is number
k * ranks + rank of all. Ranks may have different numbers of items, also none. Every function here
but :func:`rank_share` and :func:`numbered` has to be called by all ranks, in the same order, and
gives all of them the same. Without a process group of torch.distributed there is one rank, and
nothing is sent.
"""
from itertools import islice, takewhile
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, TypeVar

import torch
from mmengine.dist import (
    all_gather_object,
    all_reduce,
    broadcast_object_list,
    get_rank,
    get_world_size,
)
from torch import Tensor

Item = TypeVar('Item')


def rank_share(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items of this rank, of items that all ranks have."""
    return islice(items, get_rank(), None, get_world_size())


def numbered(items: Iterable[Item]) -> Iterator[Tuple[int, Item]]:
    """Yield the items that this rank has, each with its number among those of all ranks."""
    rank, ranks = get_rank(), get_world_size()
    return ((number * ranks + rank, item) for number, item in enumerate(items))


def first_items(items: Iterable[Item], number: int) -> List[Item]:
    """Return those of this rank among the first so many items of all ranks."""
    return [item for _, item in takewhile(lambda found: found[0] < number, numbered(items))]


def in_step(items: Iterable[Item]) -> Iterator[Optional[Item]]:
    """Yield the items that this rank has, then None until the last rank has had its last item.

    So all ranks take the same number of steps. The ranks must not be out of step in between.
    """
    items = iter(items)
    while True:
        item = next(items, None)
        if not total_over_ranks(item is not None):
            return
        yield item


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum over all ranks of a tensor, which has the same shape and dtype on each.

    The result has the device of the tensor. A single rank gets the tensor itself.
    """
    if get_world_size() == 1:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    all_reduce(total)
    return total


def total_over_ranks(number: float) -> float:
    """Return the sum over all ranks of a number, exactly for integers below 2**53."""
    if get_world_size() == 1:
        return number
    total = float(sum_over_ranks(torch.tensor(float(number), dtype=torch.double)))
    return total if isinstance(number, float) else int(total)


def gather_over_ranks(item: Any) -> List[Any]:
    """Return what each rank has, in the order of the ranks.

    It is pickled; tensors in it have to be on the CPU.
    """
    return all_gather_object(item)


def sum_by_name(values: Dict[Any, Any]) -> Dict[Any, Any]:
    """Return the sums over all ranks of values by name, of which ranks may lack some.

    They are numbers, tensors on the CPU, or whatever else can be pickled and added, in the order
    of the ranks. A single rank gets them as they are.
    """
    first, *others = gather_over_ranks(values)
    totals = dict(first)
    for part in others:
        for name, value in part.items():
            totals[name] = totals[name] + value if name in totals else value
    return totals


def from_first_rank(item: Any) -> Any:
    """Return what rank 0 has. It is pickled; tensors in it have to be on the CPU."""
    items = [item]
    broadcast_object_list(items)
    return items[0]


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], active: bool) -> None:
    """Replace gradients by their mean over the ranks that are active, as if their loss was one.

    A parameter without a gradient on an active rank counts as zero there, and has none
    afterwards if it has one on no rank. Inactive ranks, which have no gradients, get the mean.
    """
    if get_world_size() == 1:
        return
    like = parameters[0]
    present = like.new_tensor([active, *(param.grad is not None for param in parameters)])
    count, *present = sum_over_ranks(present).tolist()
    gradients = [torch.zeros_like(param) if param.grad is None else param.grad
                 for param in parameters]
    total = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    means = (total / max(count, 1)).split([param.numel() for param in parameters])
    for param, mean, number in zip(parameters, means, present):
        param.grad = mean.view_as(param).clone() if number else None
