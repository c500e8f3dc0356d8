# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What is compared: each row is a way to prune, with what is trained before and after it."""
import argparse
import ast
import json
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Dict, List, Sequence

from runs import takes_seed

from mmgcp.errors import UserError
from mmgcp.pruning.scores import criterion_names

IMPORTANCES = dict(magnitude='GroupMagnitudeImportance', taylor='GroupTaylorImportance',
                   bnscale='BNScaleImportance')
# As in network slimming: one threshold for all layers, and nothing makes up for what is removed
SLIMMING = dict(criterion=dict(type='mmgcp.BNScale'), allocation='global', compensate=False,
                groups=[dict(name='all', modules=['*'])])


@dataclass(frozen=True)
class Row:
    """A way to prune.

    Attributes:
        name (str): Its name, for --rows and for folders.
        title (str): What tables call it.
        pruner (str): A key of peers_pruning.PRUNERS.
        options (dict): For the pruner.
        first (str): What the detector is trained with before: 'constant' or 'two_phase' for
            sparse training with this schedule, 'attention', or '' for nothing.
        after (str): How it is trained afterwards: 'distil' with the unpruned detector as a
            teacher, 'recover' by its predictions alone, or '' with the annotations.
        between (int): Epochs of recovery after each step of pruning but the last.
    """
    name: str
    title: str
    pruner: str
    options: Dict[str, Any] = field(default_factory=dict)
    first: str = ''
    after: str = ''
    between: int = 0

    @property
    def has_chance(self) -> bool:
        """Whether the pruning depends on the seed by itself."""
        criterion = self.options.get('criterion')
        return criterion is not None and takes_seed(criterion)

    @property
    def record(self) -> dict:
        """What results depend on, as JSON gives it back."""
        found = dict(asdict(self), title=None)
        if not self.between:
            del found['between']
        return json.loads(json.dumps(found))


def epochs_before(inputs: Dict[str, Any]) -> int:
    """The epochs before pruning and between its steps, by what its result depends on."""
    row = inputs['row']
    between = row.get('between', 0) * (row['options'].get('steps', 1) - 1)
    return between + inputs.get('first', {}).get('epochs', 0)


DENSE = Row('dense', 'not pruned', 'none')


def all_rows(options: Dict[str, Any], variants: Dict[str, Dict[str, Any]]) -> List[Row]:
    """Return all rows in the order of the tables.

    Args:
        options (dict): Options of prune() for the rows of this project.
        variants (dict[str, dict]): More of them by name, with options of their own.
    """
    rows = [DENSE, Row('default', 'mmgcp', 'mmgcp', options)]
    rows += [Row(name, f'mmgcp, {name}', 'mmgcp', {**options, **given})
             for name, given in variants.items()]
    for name in criterion_names():
        criterion = dict(type=f'mmgcp.{name}')
        rows.append(Row(f'criterion-{name}', f'mmgcp, {name}', 'mmgcp',
                        dict(options, criterion=criterion),
                        first='attention' if name == 'CPSCA' else ''))
    rows += [
        Row('distilled', 'mmgcp, taught by the original', 'mmgcp', options, after='distil'),
        Row('recovered', 'mmgcp, recovered', 'mmgcp', options, after='recover'),
        *(Row(f'recovered-{steps}-steps', f'mmgcp, in {steps} steps, recovered after each',
              'mmgcp', dict(options, steps=steps), after='recover', between=between)
          for steps, between in ((2, 5), (3, 3), (5, 2))),
        Row('stages', 'mmgcp, three stages', 'mmgcp', options, 'two_phase', 'distil'),
        Row('slimming', 'network slimming', 'mmgcp', SLIMMING, 'constant'),
        Row('slimming-dense', 'network slimming without sparse training', 'mmgcp', SLIMMING)]
    for short, importance in IMPORTANCES.items():
        for scope in ('local', 'global'):
            for recalibrate in (False, True):
                row = Row(
                    f'tp-{short}-{scope}' + '-bn' * recalibrate,
                    f'Torch-Pruning, {importance}, {scope}' + ', recalibrated BN' * recalibrate,
                    'torch_pruning', dict(importance=importance, recalibrate=recalibrate,
                                          global_pruning=scope == 'global'))
                rows.append(row)
                if recalibrate:
                    rows.append(replace(row, name=f'{row.name}-recovered', after='recover',
                                        title=f'{row.title}, recovered as mmgcp'))
    rows += [Row('mmrazor-l1', 'MMRazor, L1', 'mmrazor_l1'),
             Row('mmrazor-group-fisher', 'MMRazor, Group Fisher', 'mmrazor_group_fisher')]
    return rows


def select(rows: Sequence[Row], patterns: Sequence[str]) -> List[Row]:
    """Return the rows whose names match one of the patterns.

    Raises:
        UserError: A pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise UserError(f'no row is called {pattern}; there are '
                            f'{", ".join(row.name for row in rows)}')
    return [row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)]


def read_options(text: str) -> Dict[str, Any]:
    """Read options of prune(), such as ``criterion.type=mmgcp.L1Norm round_to=8``.

    Values are literals of Python without spaces, or else strings.
    """
    options: Dict[str, Any] = {}
    for item in text.split():
        key, equals, value = item.partition('=')
        if not equals or not key:
            raise argparse.ArgumentTypeError(f'expected KEY=VALUE, but got {item}')
        *parents, last = key.split('.')
        place = options
        for parent in parents:
            place = place.setdefault(parent, {})
        try:
            place[last] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            place[last] = value
    return options


def read_variant(text: str) -> tuple:
    """Read ``NAME=OPTIONS``."""
    name, equals, options = text.partition('=')
    if not equals or not name or set(name) & set('/\\* '):
        raise argparse.ArgumentTypeError(f"expected NAME='KEY=VALUE ...', but got {text}")
    return name, read_options(options)
