# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A pruned network as a web page of one file, without anything from elsewhere."""
from html import escape
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

from matplotlib.colors import to_hex

from .network import DrawnLayer, parts_of
from .plots import Color, group_colors

HEIGHT = 150  # of the widest layer, in pixels
STYLE = '''
:root { color-scheme: light dark; --removed: #d8dde3; --ink: #222; --paper: #fff; --faint: #666; }
@media (prefers-color-scheme: dark) {
  :root { --removed: #454c55; --ink: #e8e8e8; --paper: #16181b; --faint: #a0a6ad; } }
body { margin: 0 auto; max-width: 1400px; padding: 12px; color: var(--ink);
  background: var(--paper); font: 14px/1.4 system-ui, sans-serif; }
h1 { font-size: 18px; margin: 4px 0 10px; } h2 { font-size: 15px; margin: 16px 0 0; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; padding: 0; margin: 0;
  list-style: none; }
.legend i { display: inline-block; width: 14px; height: 10px; margin-right: 5px; }
main { display: flex; flex-wrap: wrap; gap: 0 34px; } section { max-width: 100%; }
.row { display: flex; flex-wrap: wrap; align-items: flex-start; }
.layer { width: 34px; outline: none; margin-top: 6px; cursor: default; }
.size { height: 52px; padding-top: 5px; color: var(--faint); writing-mode: vertical-rl;
  transform: rotate(180deg); }
.size, .name { width: 100%; font-size: 10px; display: flex; align-items: center;
  white-space: nowrap; }
.bar { height: @HEIGHT@px; position: relative; margin: 0 2px; display: flex; align-items: center; }
.bar::before { content: ''; position: absolute; left: -4px; right: -4px; top: 50%;
  border-top: 1px solid var(--removed); }
.bar span { position: absolute; left: 0; right: 0; }
.before { background: var(--removed); }
.name { writing-mode: vertical-rl; max-height: 200px; overflow: hidden; padding-top: 3px; }
.layer:hover .name, .layer:focus .name { font-weight: bold; }
.layer:hover .bar, .layer:focus .bar { outline: 2px solid var(--ink); }
@media (max-width: 600px) { .layer { width: 22px; } main { gap: 0 22px; } }
#tip { position: fixed; display: none; pointer-events: none; max-width: 90vw; padding: 5px 9px;
  color: var(--paper); background: var(--ink); border-radius: 4px; font-size: 13px;
  overflow-wrap: anywhere; white-space: pre-line; }
'''.replace('@HEIGHT@', str(HEIGHT))
SCRIPT = '''
const tip = document.getElementById('tip');
function show(layer) {
  tip.textContent = layer.getAttribute('aria-label').replaceAll('; ', '\\n');
  tip.style.display = 'block';
  const place = layer.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const most = document.documentElement.clientWidth - box.width - 4;
  tip.style.left = Math.max(4, Math.min(place.left, most)) + 'px';
  const above = place.top - box.height - 4;
  tip.style.top = (above > 4 ? above : place.top + 24) + 'px';
}
function hide() { tip.style.display = 'none'; }
for (const layer of document.querySelectorAll('.layer')) {
  layer.addEventListener('mouseenter', () => show(layer));
  layer.addEventListener('focus', () => show(layer));
  layer.addEventListener('mouseleave', hide);
  layer.addEventListener('blur', hide);
}
addEventListener('scroll', hide);
'''


def write_network_html(layers: Sequence[DrawnLayer], title: str, path: Union[str, Path],
                       colors: Optional[Dict[str, Color]] = None) -> None:
    """Write a network as a page: a bar for each layer, as high as the layer is wide.

    The mouse over a bar, or the keyboard's focus, shows name, layer group, channels before and
    after, and the size of the feature map.

    Args:
        layers (Sequence[DrawnLayer]): The layers, in the order in which they run.
        title (str): The title.
        path (str | Path): The HTML file to write.
        colors (dict[str, Color], optional): Colour by layer group. Defaults to
            :func:`mmgcp.analysis.plots.group_colors`.
    """
    if colors is None:
        colors = group_colors(layer.group for layer in layers)
    codes = {name: to_hex(color) for name, color in colors.items()}
    scale = HEIGHT / max(layer.before for layer in layers)
    legend = ''.join(f'<li><i style="background:{color}"></i>{escape(name or "not pruned")}</li>'
                     for name, color in codes.items())
    sections: List[str] = []
    last: Optional[Tuple[int, int]] = None
    for part, members in parts_of(layers):
        figures = []
        for layer in members:
            size = layer.size if layer.size != last else None
            last = layer.size or last
            figures.append(_layer(layer, codes[layer.group], scale, size))
        sections.append(f'<section><h2>{escape(part)}</h2>\n<div class="row">\n'
                        + '\n'.join(figures) + '\n</div></section>')
    Path(path).write_text(f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<ul class="legend">{legend}<li><i class="before"></i>removed</li></ul>
<main>
{chr(10).join(sections)}
</main>
<div id="tip"></div>
<script>{SCRIPT}</script>
</body>
</html>
''', encoding='utf-8')


def _layer(layer: DrawnLayer, color: str, scale: float, size: Optional[tuple]) -> str:
    """Return the bar of a layer, with a size above it where that is new."""
    share = f'{layer.after / layer.before:.0%}'
    facts = [layer.name, f'group {layer.group}' if layer.group else 'not pruned',
             f'{layer.before} → {layer.after} channels ({share})']
    if layer.size:
        facts.append('{}×{} pixels'.format(*layer.size))
    above = '{}×{}'.format(*size) if size else ''
    return (f'<div class="layer" tabindex="0" aria-label="{escape("; ".join(facts))}">'
            f'<div class="size">{above}</div><div class="bar">'
            f'<span class="before" style="height:{layer.before * scale:.1f}px"></span>'
            f'<span style="height:{layer.after * scale:.1f}px;background:{color}"></span></div>'
            f'<div class="name">{escape(layer.short)}</div></div>')
