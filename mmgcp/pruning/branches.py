# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Parallel branches: layers whose outputs are added before anything else, and make one kernel.

A RepVGG block (`arXiv 2101.03697 <https://arxiv.org/abs/2101.03697>`_, section 3.3) adds what a
3x3 convolution, a 1x1 convolution and a BatchNorm compute of the same input. All of these are
linear, so in deployment they are one convolution, and they decide on its channels as one layer.
What is such a block follows from the graph of the computation, not from the class of a module.
"""
from collections import Counter
from typing import Any, Dict, Iterable, List, Tuple

import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm

Branches = Tuple[str, ...]  # names of the layers of a block, those with the largest kernel first
Edge = Tuple[Any, int]  # a node of the autograd graph, and which of its outputs
Chain = List[Tuple[str, nn.Module]]  # layers of a branch, the last one first


def find_branches(model: nn.Module, nodes: Iterable[Any]) -> List[Branches]:
    """Find the layers that make one kernel, in the autograd graph of a run in eval mode.

    Args:
        model (nn.Module): The model, all of whose parameters had gradients in that run.
        nodes (Iterable): Nodes of the graph; all that lead to them is looked at.

    Returns:
        list[tuple[str]]: The names of the convolutions and BatchNorms of each block. A layer that
        is not in the same block in all its runs, or whose output is also read by something else
        than the sum, is in none.
    """
    found, readers = _all_nodes(nodes)
    owners = {layer.weight: (name, layer) for name, layer in model.named_modules()
              if isinstance(layer, (nn.Conv2d, _BatchNorm)) and layer.weight is not None}
    inner = {source for node in found if _is_sum(node) for source, _ in node.next_functions
             if source is not None and _is_sum(source) and readers[source] == 1}
    uses = Counter(owners[item][0] for node in found for item in _variables(node) if item in owners)
    blocks: Dict[str, List[Branches]] = {}  # by layer, one for each run
    for node in found:
        if _is_sum(node) and node not in inner:
            layers = _block(node, owners, readers)
            for name in layers:
                blocks.setdefault(name, []).append(layers)
    candidates = dict.fromkeys(block for several in blocks.values() for block in several)
    return [block for block in candidates
            if all(blocks[name] == [block] * uses[name] for name in block)]


def _variables(node: Any) -> List[Any]:
    """List what a node reads: parameters, or None for anything else."""
    return [getattr(source, 'variable', None) for source, _ in node.next_functions]


def _all_nodes(nodes: Iterable[Any]) -> Tuple[List[Any], Counter]:
    """List all nodes that lead to some, and count how many read the output of each."""
    found: Dict[Any, None] = {}
    readers: Counter = Counter()
    pending = [node for node in nodes if node is not None]
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            sources = [source for source, _ in node.next_functions if source is not None]
            readers.update(sources)
            pending.extend(sources)
    return list(found), readers


def _is_sum(node: Any) -> bool:
    return type(node).__name__ == 'AddBackward0'


def _block(total: Any, owners: Dict, readers: Counter) -> Branches:
    """Return the layers that a sum makes one kernel of; none if it is no such block."""
    branches, pending = [], [total]
    while pending:
        for source, _ in pending.pop().next_functions:
            if source is None:
                continue  # a number
            if _is_sum(source) and readers[source] == 1:
                pending.append(source)
            else:
                branches.append(_readings(source, owners, readers))
    if len(branches) < 2 or not all(branches):
        return ()
    common = set.intersection(*({edge for edge, _ in readings} for readings in branches))
    for edge in common:
        chains = [dict(readings)[edge] for readings in branches]
        if _fits(chains):
            chains.sort(key=lambda chain: -getattr(chain[-1][1], 'kernel_size', (0, ))[0])
            return tuple(name for chain in chains for name, _ in chain)
    return ()


def _readings(node: Any, owners: Dict, readers: Counter) -> List[Tuple[Edge, Chain]]:
    """Return what a branch may read, and the layers from there on: a BatchNorm, a convolution."""
    found, chain = [], []
    while node is not None and readers[node] == 1:
        variables = _variables(node)
        layer = next((owners[item] for item in variables if item in owners), None)
        if layer is None:
            scales = [item is not None and item.numel() == 1 for item in variables]
            if chain or type(node).__name__ != 'MulBackward0' or sum(scales) != 1:
                break  # a number that is learnt may multiply the branch
            node = node.next_functions[scales.index(False)][0]
            continue
        chain = [*chain, layer]
        found.append((node.next_functions[0], chain))
        if isinstance(layer[1], nn.Conv2d):
            break
        node = node.next_functions[0][0]
    return found


def _fits(chains: List[Chain]) -> bool:
    """Whether kernels can be added: applied at the same places, around the same centres."""
    convs = [layer for chain in chains for _, layer in chain if isinstance(layer, nn.Conv2d)]
    if not convs or any(len(chain) > 2 for chain in chains):
        return False
    steps = {(conv.stride, conv.groups) for conv in convs}
    only_norms = len(convs) < len(chains)
    return (len(steps) == 1 and not (only_norms and convs[0].stride != (1, 1))
            and all(map(_is_centred, convs)))


def _is_centred(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == 'zeros' and conv.padding != 'valid' and all(
        size % 2 == 1 and (conv.padding == 'same' or conv.padding[side] == step * (size // 2))
        for side, (size, step) in enumerate(zip(conv.kernel_size, conv.dilation)))
