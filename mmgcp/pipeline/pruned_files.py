# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The files that a pruned detector consists of."""
import warnings
from pathlib import Path
from typing import List

from mmengine.config import Config
from mmengine.runner.checkpoint import weights_to_cpu

from mmgcp.attention import plain_config
from mmgcp.pruning.detector import CHECKPOINT, check_written, drop_hooks, make_pruned_config
from mmgcp.pruning.report import write_report
from mmgcp.pruning.result import PruningResult
from mmgcp.utils.checkpoint_files import save_checkpoint
from mmgcp.utils.config_text import write_config
from mmgcp.utils.folders import replacing_results
from mmgcp.utils.process_state import silence
from mmgcp.version import __version__

from .network_drawing import FILES as NETWORK_FILES
from .network_drawing import draw_network

RESULTS = ('pruned.py', 'pruned.pth', 'plan.json', 'report.json', 'report.md', 'channels.png',
           'scores.png', *NETWORK_FILES)
# Where MMDetection looks for the names of classes; where there are none, it takes COCO's
CLASS_META = ('dataset_meta', 'CLASSES', 'PALETTE')


def write_pruned(result: PruningResult, cfg: Config, detector: str, meta: dict, folder: Path,
                 keep_hooks: bool = False) -> List[str]:
    """Write a pruned detector, its plan and its reports: everything, or nothing if anything fails.

    Args:
        result (PruningResult): What pruning led to.
        cfg (Config): The original's config.
        detector (str): The name of its class; see
            :func:`mmgcp.pruning.detector.registered_name`.
        meta (dict): The ``meta`` of its checkpoint, of which the names of classes stay.
        folder (Path): The folder, which exists; see
            :func:`mmgcp.utils.folders.replacing_results`.
        keep_hooks (bool): Whether the config keeps its hooks for sparse training. Defaults to
            False: they are dropped, and their names printed.

    Returns:
        list[str]: The names of the files.

    Raises:
        PruningError: The pruned detector could not be built from them.
    """
    cfg = plain_config(cfg)
    for name in [] if keep_hooks else drop_hooks(cfg):
        print(f'{name} is not in pruned.py: the pruned detector needs no sparse training '
              '(--keep-hooks keeps it)')
    meta = {key: meta[key] for key in CLASS_META if meta.get(key)}
    meta['mmgcp_version'] = __version__
    with replacing_results(folder, RESULTS) as new:
        pruned = make_pruned_config(cfg, detector, result.changed_channels,
                                    result.absent_blocks)
        write_config(pruned, new / 'pruned.py', [CHECKPOINT])
        state = weights_to_cpu(result.model.state_dict())
        save_checkpoint(dict(meta=meta, state_dict=state), new / 'pruned.pth')
        with silence():  # MMEngine would log a path that exists for a moment only
            check_written(new)
        result.plan.save(new / 'plan.json')
        write_report(result, new)
        _draw_network(new)
        return sorted(path.name for path in new.iterdir())


def _draw_network(folder: Path) -> None:
    """Draw the network, without which the results are still written."""
    try:
        draw_network(folder)
    except OSError:  # nothing else could be written, either
        raise
    except Exception as error:
        warnings.warn(f'{NETWORK_FILES[0]} has not been drawn: {type(error).__name__}: {error}',
                      stacklevel=3)
