# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Training batches for a detector and its accuracy, from the data of its config."""
import copy
import os
from contextlib import contextmanager
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.registry import EVALUATOR, DefaultScope
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import DataLoader

from mmgcp.compatibility import mend_openmmlab
from mmgcp.errors import UserError, told
from mmgcp.nn.distributed import from_first_rank, gather_over_ranks, numbered, rank_share
from mmgcp.nn.temporarily import eval_mode
from mmgcp.nn.training_loss import Batch
from mmgcp.utils.config import drop_collate_scope, nested_dicts
from mmgcp.utils.process_state import (
    alone,
    hub_info,
    random_states_kept,
    seed_random,
    silence,
)

# How much of the images is kept in memory for further iterations
CACHE_BYTES = 256 * 2**20


def calibration_batches(cfg: Config, model: nn.Module, num_batches: int,
                        batch_size: int = 8) -> Iterator[Batch]:
    """Load batches of training data as the model sees them in training.

    Each call gives the same batches and leaves the random states of the process unchanged. Of
    several processes each gets its share: batch i of all belongs to rank i modulo their number.

    Args:
        cfg (Config): A complete config with ``train_dataloader``.
        model (nn.Module): The detector. A copy of its data preprocessor is used.
        num_batches (int): Number of batches of all processes; there are fewer if the data set
            is too small.
        batch_size (int): Largest number of images in a batch, unless the config has a
            smaller one. Defaults to 8.

    Yields:
        Batch: Images (N, C, H, W) with the device and the precision of the model, and
        their ground truth.

    Raises:
        UserError: The config has no training data, or it cannot be loaded.
    """
    preprocessor = copy.deepcopy(model.data_preprocessor)
    for module in preprocessor.modules():
        if hasattr(module, 'rank'):
            module.rank = 0  # on the others, random sizes of images are left to this one
    with _training_iteration(cfg, 0), _one_sentence('calibration images'):
        options = _loader_options(cfg, 'train_dataloader')
        options['batch_size'] = min(options.get('batch_size', 1), batch_size)
        all_needed = _depend_on_each_other(options, preprocessor)
        loader = Runner.build_dataloader(options, seed=0)
        indices_of_batches = iter(loader.batch_sampler)
    for number in range(num_batches):
        is_ours = number % get_world_size() == get_rank()
        with _training_iteration(cfg, number), _one_sentence('calibration images'):
            indices = next(indices_of_batches, None)
            if indices is None:
                return
            if is_ours or all_needed:
                data = preprocessor(_load(loader, indices), training=True)
        if is_ours:
            if not bool(data['inputs'].isfinite().all()):
                raise UserError(f'batch {number} of the calibration images has pixels that are not '
                                'finite; are mean and std of the data_preprocessor right?')
            yield Batch(data['inputs'].to(next(model.parameters())), data['data_samples'])


class CalibrationBatches:
    """Batches of training data to iterate over several times, those of this process.

    They are loaded once if they fit into ``CACHE_BYTES``, otherwise in each iteration.

    Args:
        cfg, model, num_batches, batch_size: See :func:`calibration_batches`.
    """

    def __init__(self, cfg: Config, model: nn.Module, num_batches: int, batch_size: int = 8):
        self._arguments = cfg, model, num_batches, batch_size
        self._loaded: Optional[List[Batch]] = None

    def __iter__(self) -> Iterator[Batch]:
        if self._loaded is not None:
            yield from self._loaded
            return
        loaded, size = [], 0
        for batch in calibration_batches(*self._arguments):
            size += batch.images.nelement() * batch.images.element_size()
            if size <= CACHE_BYTES:
                loaded.append(batch)
            else:
                loaded.clear()
            yield batch
        if size <= CACHE_BYTES:
            self._loaded = loaded

    def __len__(self) -> int:
        """How many of the batches that were asked for are ours; the data set may be smaller."""
        return sum(1 for _ in rank_share(range(self._arguments[2])))


class ImagesOf:
    """The images (N, C, H, W) of batches, to iterate over.

    Args:
        batches (Iterable[Batch]): The batches.
    """

    def __init__(self, batches: Iterable[Batch]):
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.images for batch in self.batches)


@torch.no_grad()
def evaluate(model: nn.Module,
             cfg: Config,
             metric: Optional[str] = None,
             num_images: Optional[int] = None,
             progress: Optional[Callable[[int, int], None]] = None) -> Tuple[str, float]:
    """Measure the accuracy of a detector on the config's validation data.

    A detector that finds nothing has an accuracy, too: a mAP of 0. Several processes share the
    batches, and all get the metric that one process measures.

    Args:
        model (nn.Module): The detector. The modes of its modules are restored.
        cfg (Config): A complete config with ``val_dataloader`` and ``val_evaluator``.
        metric (str, optional): Name of the metric, such as ``'coco/bbox_mAP'``. Defaults to
            None: the first one whose name contains mAP, or otherwise the first one.
        num_images (int, optional): Number of images, the first ones of the data set.
            Defaults to None: all.
        progress (Callable, optional): Called after each batch of this process with the number
            of finished batches and the number of all batches.

    Returns:
        tuple[str, float]: Name and value of the metric.

    Raises:
        UserError: The config has no validation data or evaluator, the data cannot be loaded,
            or there is no such metric or none at all.
    """
    if num_images is not None and num_images < 1:
        raise UserError(f'num_images must be at least 1, but is {num_images}')
    mend_openmmlab()  # COCO's metric, if nothing is found
    with DefaultScope.overwrite_default_scope(_scope(cfg)):
        with _one_sentence('validation data'), silence(), alone():
            loader, evaluator = _build_validation(cfg, num_images)
            batches = _first_images(loader.batch_sampler, num_images)
        with eval_mode(model):
            results = {}  # of each metric, by number of the batch
            for number, indices in numbered(rank_share(batches)):
                with _one_sentence('validation data'):
                    batch = _load(loader, indices)
                evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
                results[number] = [item.results for item in evaluator.metrics]
                for item in evaluator.metrics:
                    item.results = []
                if progress is not None:
                    progress(number + 1, len(batches))
        values = _evaluate_results(evaluator, results, sum(map(len, batches)))
    return _choose_metric(values, metric)


def _evaluate_results(evaluator: Evaluator, results: Dict[int, List[list]],
                      num_images: int) -> Dict[str, float]:
    """Evaluate the results of the metrics for the batches of all ranks, in their order."""
    for part in gather_over_ranks(results):
        results = {**results, **part}
    for number, metric in enumerate(evaluator.metrics):
        metric.results = [item for batch in sorted(results) for item in results[batch][number]]
    values = None
    if is_main_process():
        with silence(), alone():
            values = evaluator.evaluate(num_images)
    return from_first_rank(values)


def _load(loader: DataLoader, indices: Iterable[int]) -> dict:
    """Load a batch in this process, given the indices of its images."""
    return loader.collate_fn([loader.dataset[index] for index in indices])


def _loader_options(cfg: Config, name: str) -> dict:
    """A copy of the config of a data loader, for loading in this process only."""
    if not cfg.get(name):
        raise UserError(f'the config has no {name}')
    options = copy.deepcopy(cfg[name])
    options.update(num_workers=0, persistent_workers=False, pin_memory=False, drop_last=False)
    for key in ('prefetch_factor', 'multiprocessing_context', 'timeout', 'worker_init_fn'):
        options.pop(key, None)
    drop_collate_scope(options)
    return options


def _depend_on_each_other(options: dict, preprocessor: nn.Module) -> bool:
    """Whether batches depend on those before, by images kept for mosaics or by random sizes."""
    return bool(getattr(preprocessor, 'batch_augments', None)) or any(
        part.get('use_cached') or 'Cached' in str(part.get('type'))
        for part in nested_dicts(options['dataset']))


def _build_validation(cfg: Config, num_images: Optional[int]) -> Tuple[DataLoader, Evaluator]:
    options = _loader_options(cfg, 'val_dataloader')
    if not cfg.get('val_evaluator'):
        raise UserError('the config has no val_evaluator')
    wraps_others = {'dataset', 'datasets'} & set(options['dataset'])  # these have no indices
    if num_images is not None and not wraps_others:
        options['dataset']['indices'] = num_images
    loader = Runner.build_dataloader(options)
    evaluator = _build_evaluator(copy.deepcopy(cfg.val_evaluator))
    evaluator.dataset_meta = getattr(loader.dataset, 'metainfo', None)
    if num_images is not None:
        _limit_images(evaluator, loader.dataset, min(num_images, len(loader.dataset)))
    return loader, evaluator


def _first_images(batches: Iterable[List[int]], num_images: Optional[int]) -> List[List[int]]:
    """Return batches of indices without those behind a number of images, if it is given."""
    if num_images is None:
        return list(batches)
    chosen = [[index for index in batch if index < num_images] for batch in batches]
    return [batch for batch in chosen if batch]


def _build_evaluator(options: Union[dict, List[dict]]) -> Evaluator:
    if isinstance(options, dict) and 'metrics' in options:
        options.setdefault('type', 'Evaluator')
        return EVALUATOR.build(options)
    return Evaluator(options)


def _limit_images(evaluator: Evaluator, dataset: BaseDataset, num_images: int) -> None:
    """Keep metrics that have their own annotation file from counting other than the first."""
    ids = [dataset.get_data_info(index)['img_id'] for index in range(num_images)]
    for metric in evaluator.metrics:
        if hasattr(metric, 'img_ids'):
            metric.img_ids = ids


def _choose_metric(values: Dict[str, float], metric: Optional[str]) -> Tuple[str, float]:
    if not values:
        raise UserError('the val_evaluator of the config reports no metrics')
    if metric is None:
        metric = next((name for name in values if 'mAP' in name), next(iter(values)))
    if metric not in values:
        raise UserError(f'there is no metric {metric!r}; there are {", ".join(values)}')
    return metric, float(values[metric])


def _scope(cfg: Config) -> str:
    return cfg.get('default_scope', 'mmyolo')


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn any error in loading data into a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f'the {what} cannot be loaded: {error}') from error
    except Exception as error:  # data sets and transforms may raise anything
        hint = ''
        if isinstance(error, FileNotFoundError):
            hint = f' (paths in configs start at the working directory, {os.getcwd()})'
        raise UserError(f'the {what} cannot be loaded: {told(error)}{hint}') from error


@contextmanager
def _training_iteration(cfg: Config, number: int) -> Iterator[None]:
    """Load data as in an iteration of training, with the same random choices each time."""
    with DefaultScope.overwrite_default_scope(_scope(cfg)), random_states_kept(), alone():
        seed_random(number)
        with hub_info('iter', number):  # read by batch augmentations
            yield
