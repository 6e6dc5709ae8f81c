"""The page of ``mpkernels report``: a Jinja template (jinja2 comes with torch), no script, no other hosts."""

from __future__ import annotations

from jinja2 import Environment

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #188038; --bad: #c5221f; --hole: #b06000; }
@media (prefers-color-scheme: dark) { :root { --good: #81c995; --bad: #f28b82; --hole: #fdd663; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: .9rem; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.default td { font-weight: 600; } .wide { overflow-x: auto; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .hole { color: var(--hole); }
.soft { opacity: .75; } code { background: var(--soft); padding: 0 .25em; border-radius: 3px; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; border: 1px solid var(--line); }
figcaption { max-width: 46rem; } figcaption b { display: block; }
"""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mpkernels: report</title>
<style>{{ style }}</style>
</head>
<body>
{%- macro grid(headers, numbers, rows) %}
<div class="wide"><table>
<tr>{% for h in headers %}<th{% if h in numbers %} class="n"{% endif %}>{{ h }}</th>{% endfor %}</tr>
{%- for row in rows %}
<tr{% if row.style %} class="{{ row.style }}"{% endif %}>
{%- for h, cell in zip(headers, row.cells) %}
<td{% if h in numbers %} class="n"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table></div>
{%- endmacro %}
<h1>mpkernels {{ info.versions.mpkernels }}</h1>
<p class="soft">{{ info.machine.processor }}, {{ info.machine.threads }} threads
{%- for gpu in info.machine.gpus %}, {{ gpu }}{% endfor %}; torch {{ info.versions.torch }},
triton {{ info.versions.triton or "not installed" }}, Python {{ info.versions.python }}; written {{ date }}</p>
<ul>{% for line in summary %}<li>{{ line }}</li>{% endfor %}</ul>

{%- for demo in demos %}
<h2>Demo: {{ demo.name }}</h2>
<p class="soft">{{ demo.data }}{% if demo.date %} ({{ demo.date }}){% endif %}</p>
{%- for picture in demo.pictures %}
<figure><img src="{{ picture.src }}" alt="{{ picture.title }}">
<figcaption><b>{{ picture.title }}</b>{{ picture.caption }}</figcaption></figure>
{%- endfor %}
{{ grid(["figure", "value"], ["value"], demo.figures) }}
{%- endfor %}

<h2>What runs here</h2>
{%- for device, table in matrix.items() %}
<h3>{{ device }} tensors</h3>
<div class="wide"><table>
<tr><th>op</th>{% for b in info.backends %}<th>{{ b }}</th>{% endfor %}</tr>
{%- for op, cells in table.items() %}
<tr><td>{{ op }}</td>
{%- for c in cells %}
<td>{% if c.available %}<span class="good">&#10003;{{ " default" if c.default }}</span>
{%- else %}<span class="hole">{{ c.reason }}</span>{% endif %}</td>
{%- endfor %}</tr>
{%- endfor %}
</table></div>
{%- endfor %}

<h2>Is it right</h2>
<p>The largest error against float64 over all cases, beside its bound: twice the error of the slow reference in the same
dtype, and a band of a few roundings; so the rows of the reference say how precise a dtype is,
and cannot fail. {{ validation.verdict }} <span class="soft">({{ validation.date }})</span></p>
{{ grid(validation.headers, validation.numbers, validation.rows) }}
{%- for line in validation.failures %}
<p class="bad">{{ line }}</p>
{%- endfor %}
{%- for line in validation.holes %}
<p class="soft">{{ line }}</p>
{%- endfor %}

<h2>How fast it is</h2>
{%- for b in benches %}
<h3>{{ b.setting }}</h3>
<p class="soft">{{ b.peers }}; {{ b.ceilings }}.</p>
<ul>{% for line in b.headlines %}<li>{{ line }}</li>{% endfor %}</ul>
{%- for t in b.tables %}
<p><b>{{ t.title }}</b></p>
{{ grid(b.headers, b.numbers, t.rows) }}
{%- endfor %}
{%- else %}
<p>Nothing is measured yet: <code>mpkernels bench --record</code>.</p>
{%- endfor %}
<p class="soft">Ratios are medians over rounds of two things run in turn in one process. forward+backward takes the
gradients of the first two differentiable arguments from gradients of the first three outputs.</p>

{%- if kernels %}
<h2>GPU kernels as compiled</h2>
<p class="soft">nvcc {{ kernels.nvcc }}, triton {{ kernels.triton }}. No GPU is needed for these figures.</p>
{{ grid(kernels.headers, kernels.numbers, kernels.rows) }}
{%- endif %}
</body>
</html>
"""


def render(**content) -> str:
    """The page; text is escaped."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["zip"] = zip
    return environment.from_string(_TEMPLATE).render(style=_STYLE, **content)
