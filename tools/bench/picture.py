"""The picture of README.md: bars of tokens a second, drawn as SVG without a library."""

import html

import report

PANELS = ("decode-1", "decode-8", "prefill-512")
MARGIN, LABELS, PANEL, GAP, ROW, TOP = 12, 178, 196, 26, 22, 62
NAMES = {
    "ours": "gemma_keras",
    "kerashub": "KerasHub",
    "zeromodels": "ZeroModels",
    "transformers": "transformers",
    "llama.cpp": "llama.cpp",
}
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "torch"}
# Colours that do on white and on black.
STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600 } .small { font-size: 11px; fill: #6e7781 }
.ours { fill: #0a7d6c } .peer { fill: #9aa7b4 } .limit { stroke: #d1495b }
.strong { font-weight: 600 } .axis { stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small { fill: #9198a1 } .axis { stroke: #3d444d }
.ours { fill: #2bb39c } .peer { fill: #656f7a } }
"""


def picture(known):
    """The SVG of a run."""
    figures = report.Figures(known)
    rows = [
        (who, report.contender_of(who))
        for who in figures.names
        if report.contender_of(who).name != "limit"
        and any(figures.median(who, what) for what in PANELS)
    ]
    panels = [p for p in PANELS if any(figures.median(who, p) for who, _ in rows)]
    width = MARGIN + LABELS + len(panels) * (PANEL + GAP)
    height = TOP + ROW * len(rows) + 46
    parts = [_labels(rows)]
    for index, what in enumerate(panels):
        left = LABELS + index * (PANEL + GAP)
        parts.append(_panel(figures, rows, what, left))
    parts.append(_footer(known, figures, height))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="-{MARGIN} 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<title>{html.escape(_told(known))}</title>\n<style>\n{STYLE}</style>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _told(known):
    return f"Tokens per second, {known['settings']['model']} model"


def _labels(rows):
    several = len({who.dtype for _, who in rows if who.backend}) > 1
    lines = []
    for index, (_, who) in enumerate(rows):
        first = index == 0 or rows[index - 1][1].name != who.name
        y = TOP + ROW * index + 15
        if first:
            name = NAMES.get(who.name, who.name)
            strong = ' class="strong"' if who.name.startswith("ours") else ""
            lines.append(_text(0, y, name, strong))
        detail = BACKENDS.get(who.backend, who.dtype)
        if several and who.backend:
            detail += " " + who.dtype.replace("float", "")
        lines.append(_text(LABELS - 10, y, detail, ' class="small" text-anchor="end"'))
    return "\n".join(lines)


def _panel(figures, rows, what, left):
    values = {who: figures.median(who, what) for who, _ in rows}
    limits = {who: report.limit_of(who, figures, what) for who, _ in rows}
    most = max([v for v in [*values.values(), *limits.values()] if v])
    # Room for the number after the longest bar.
    scale = (PANEL - 34) / most
    lines = [_text(left, TOP - 18, report.SPEED[what], ' class="title"')]
    lines.append(
        f'<line class="axis" x1="{left - 0.5}" x2="{left - 0.5}" y1="{TOP - 4}" '
        f'y2="{TOP + ROW * len(rows)}"/>'
    )
    for index, (who, contender) in enumerate(rows):
        y = TOP + ROW * index
        value, limit = values[who], limits[who]
        if value is None:
            if (who, what) in figures.failures:
                lines.append(_text(left + 5, y + 15, "failed", ' class="small"'))
            continue
        ours = contender.name.startswith("ours")
        length = scale * value
        lines.append(
            f'<rect class="{"ours" if ours else "peer"}" x="{left}" y="{y + 3}" '
            f'width="{length:.1f}" height="{ROW - 6}"/>'
        )
        if limit:
            x = left + scale * limit
            lines.append(
                f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 1}" '
                f'y2="{y + ROW - 1}"/>'
            )
        # Not on the line of the limit.
        end = length if not limit or abs(scale * limit - length) > 36 else scale * limit
        number = f"{value:.0f}" if value >= 99.5 else f"{value:.1f}"
        strong = ' class="strong"' if ours else ""
        lines.append(_text(left + max(end, length) + 4, y + 15, number, strong))
    return "\n".join(lines)


def _footer(known, figures, height):
    machine = known["machine"]
    where = machine["gpu"] or f"{machine['cores']} cores of an {machine['cpu']}"
    limit = any(report.contender_of(who).name == "limit" for who in figures.names)
    first = "Tokens per second; longer is better."
    if limit:
        first += " The red line: what the machine allows in that framework."
    lines = [_text(0, 18, first)]
    told = f"Medians of one run of tools/bench/compare.py, {where}, {machine['date']}."
    return "\n".join([*lines, _text(0, height - 12, told, ' class="small"')])


def _text(x, y, words, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{html.escape(words)}</text>'
