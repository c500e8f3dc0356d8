# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Read mutated files of Darknet and mutated pruning plans; a few of each are part of the tests.

Nothing but mmgcp's own errors may come of any file, in at most 2 seconds of CPU time and 500 MB:

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/fuzz_files.py --darknet 100000 --plans 20000
"""
import argparse
import copy
import json
import random
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from mmgcp.darknet import (
    check_numbers,
    class_names,
    load_parameters,
    model_config,
    num_classes_of,
    read_cfg,
)
from mmgcp.errors import UserError
from mmgcp.pruning import ChannelSlice, ChannelUnit, PruningPlan, UnitPlan, validate_plan

ROOT = Path(__file__).resolve().parents[1]
MAX_SECONDS, MAX_BYTES = 2., 500 * 2**20
NUMBERS = ('0', '-1', '1', '33', '1000000', '-5', 'nan', 'inf', '-inf', '1e400', '1e-300', '1e9',
           '9' * 5000, '-' + '9' * 30, '', ',', '1,2,3', 'x', '0x10', '1_0', '٣', '1.5', '8',
           '16', '2147483648', '18446744073709551616', ','.join(['1'] * 5000))
TEXTS = ('', '\ufeff', '\0', '[', ']', '[]', '[net]', '[yolo]', '=', '=1', '#', '{{ fileDirname }}',
         'a' * 5000, '\u2028', '\x85', 'é', '[shortcut]\nfrom=-3\n' * 700, '[' * 3000)
VALUES = (None, True, 0, -1, 1.5, 10**30, float('nan'), float('inf'), '', 'x', '8', '\ud800', [],
          [[]], {}, {'a': {}}, [1, 1], ['a'], 'a' * 5000, {'type': 'X'}, [10**12] * 50)


def mutate_text(draw, text):
    """Change a text in one place: a number, a line, or characters."""
    kind = draw.randrange(6)
    numbers = list(re.finditer(r'(?<==)[^\n]+', text))
    if kind < 2 and numbers:
        found = draw.choice(numbers)
        return text[:found.start()] + draw.choice(NUMBERS) + text[found.end():]
    lines = text.split('\n')
    place, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    if kind == 2:
        del lines[place:place + draw.choice((1, 1, 1, 5, 50))]
    elif kind == 3:
        lines.insert(place, draw.choice((lines[other], draw.choice(TEXTS))))
    elif kind == 4:
        lines[place], lines[other] = lines[other], lines[place]
    else:
        line = lines[place]
        cut = draw.randrange(len(line) + 1)
        lines[place] = line[:cut] + draw.choice(TEXTS + NUMBERS) + line[cut + draw.randrange(2):]
    return '\n'.join(lines)


def mutate_bytes(draw, content, header=20):
    """Change bytes in one place: values, the length, or the header."""
    kind, place = draw.randrange(6), draw.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content + draw.randbytes(draw.choice((1, 4, 5000))) if hasattr(
            draw, 'randbytes') else content + bytes(draw.choice((1, 4, 5000)))
    if kind == 2:
        value = struct.pack('<f', draw.choice((float('nan'), float('inf'), -1., 1e38, 0.)))
        place -= place % 4
        return content[:place] + value + content[place + 4:]
    if kind == 3:
        values = [draw.choice((0, 1, 2, -1, 1001, 2**31 - 1, -2**31)) for _ in range(5)]
        return struct.pack('<5i', *values) + content[header:]
    return content[:place] + bytes([draw.randrange(256)]) + content[place + 1:]


def mutate_value(draw, content):
    """Replace, remove or add something anywhere in what JSON stands for; returns a copy."""
    content = copy.deepcopy(content)
    places, level = [], [content]
    while level:
        value = level.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value))
        places += [(value, key) for key in keys]
        level += [value[key] for key in keys if isinstance(value[key], (dict, list))]
    owner, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[draw.choice(('x', '', 'name', 'removed', 'a' * 300))] = owner[key]
    else:
        owner[key] = draw.choice(VALUES)
    return content


class Darknet:
    """Files of a small network that another program has pruned."""

    def __init__(self, folder):
        sys.path[:0] = [str(ROOT / 'tests' / 'test_darknet'), str(ROOT / 'tests')]
        from foreign_networks import pruned_sections, write_network
        cfg, weights = write_network(pruned_sections(3, low=1, high=4), folder)
        self.files = cfg, weights, folder / 'net.names'
        self.texts = cfg.read_text(), 'a\nb\nc\n'
        self.weights = weights.read_bytes()
        self.files[2].write_text(self.texts[1])

    def write(self, draw):
        """Write mutated files."""
        cfg, names, weights = *self.texts, self.weights
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            kind = draw.randrange(10)
            if kind < 7:
                cfg = mutate_text(draw, cfg)
            elif kind < 9:
                weights = mutate_bytes(draw, weights)
            else:
                names = mutate_text(draw, names)
        content = cfg.encode('utf-8', 'replace')
        self.files[0].write_bytes(mutate_bytes(draw, content) if draw.randrange(20) == 0 else
                                  content)
        self.files[1].write_bytes(weights)
        self.files[2].write_bytes(names.encode('utf-8', 'replace'))

    def read(self):
        """Read them as tools/model_converters/darknet_to_mmgcp.py does."""
        sections = read_cfg(self.files[0])
        check_numbers(sections)
        load_parameters(sections, self.files[1])
        class_names(num_classes_of(sections[-1]), self.files[2])
        model_config(sections)


class Plans:
    """A plan for three channel units."""

    def __init__(self, folder):
        self.file, self.copy = folder / 'plan.json', folder / 'copy.json'
        every = torch.arange(6)
        self.units = [
            ChannelUnit(name, 6, (ChannelSlice(name, 'out', every, every), ), norms, groups)
            for name, norms, groups in (('stem.conv', None, None), ('neck.conv', every // 2, None),
                                        ('head.conv', None, every // 3))]
        PruningPlan([UnitPlan('stem.conv', {'stem.conv': 'a'}, 6, [0, 2]),
                     UnitPlan('neck.conv', {'neck.conv': ''}, 6, [2, 3]),
                     UnitPlan('head.conv', {'head.conv': 'b'}, 6, [1, 4])],
                    {'a': 0.25, 'b': None}, {'pred': 'predicts'},
                    dict(ratio=0.5, criterion=dict(type='mmgcp.OBS'))).save(self.file)
        self.text = self.file.read_text()
        self.content = json.loads(self.text)

    def write(self, draw):
        """Write a mutated plan."""
        content = self.content
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            content = mutate_value(draw, content)
            if not content:
                break
        text = json.dumps(content)
        kind = draw.randrange(20)
        if kind == 0:
            text = draw.choice('[{') * draw.choice((100, 200000))
        elif kind == 1:
            text = '{"a":' * 70 + '1' + '}' * 70
        elif kind == 2:
            text = re.sub(r'\d+', '9' * 5000, text, count=draw.randrange(1, 9))
        content = text.encode()
        self.file.write_bytes(mutate_bytes(draw, content) if draw.randrange(4) == 0 else content)

    def read(self):
        """Read it, compare it with the model, and write it again."""
        plan = PruningPlan.load(self.file)
        validate_plan(plan, self.units)
        plan.removed()
        plan.save(self.copy)


def fuzz(kind, number, seed, first=0, report=lambda line: None):
    """Read mutated files.

    Args:
        kind (type): What to mutate, Darknet or Plans.
        number (int): How many files.
        seed (int): Together with the number of a file it decides on its mutations.
        first (int): Number of the first file. Defaults to 0.
        report (Callable): Called with a line now and then.

    Returns:
        tuple[Counter, list[str]]: How many were accepted and refused, and what went wrong.
    """
    counts, wrong = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        files = kind(Path(folder))
        files.read()  # as it is, it is accepted
        for index in range(first, first + number):
            files.write(random.Random(f'{seed} {index}'))
            started = time.process_time()
            try:
                files.read()
                counts['accepted'] += 1
            except UserError as error:
                counts['refused'] += 1
                if '\n' in str(error) or len(str(error)) > 1000:
                    wrong.append(f'{index}: {str(error)[:200]!r} is no sentence')
            except BaseException as error:  # which is what must not happen
                wrong.append(f'{index}: {traceback.format_exc(limit=-3)}')
                if isinstance(error, KeyboardInterrupt):
                    break
            seconds = time.process_time() - started
            if seconds > MAX_SECONDS:
                wrong.append(f'{index}: {seconds:.1f} s')
            if (index + 1 - first) % 500 == 0:
                report(f'{kind.__name__}: {index + 1}, {dict(counts)}, {len(wrong)} wrong')
    return counts, wrong


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--darknet', type=int, default=0, help='how many Darknet files')
    parser.add_argument('--plans', type=int, default=0, help='how many plans')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--first', type=int, default=0, help='number of the first file')
    args = parser.parse_args()
    failed = False
    for kind, number in ((Darknet, args.darknet), (Plans, args.plans)):
        if not number:
            continue
        fuzz(kind, 3, args.seed)  # what is loaded and built once
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, resource.RLIM_INFINITY))
        counts, wrong = fuzz(kind, number, args.seed, args.first, lambda line: print(
            line, flush=True))
        print(f'{kind.__name__}: {sum(counts.values())} files, {dict(counts)}')
        print('\n'.join(wrong))
        failed = failed or bool(wrong)
    sys.exit(failed)


if __name__ == '__main__':
    main()
