"""Line charts as SVG, inside a page that sets the colours."""

import html
import math

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 30
# More points than pixels say nothing.
MOST_POINTS = 600


def chart(title, lines):
    """A `<figure>` with one chart over the steps.

    Args:
        title: what the numbers are.
        lines: `(colour, label, points)`, where the colour is a CSS variable of the
            page and points are `(step, value)`.
    """
    lines = [
        (colour, label, _thinned([p for p in points if math.isfinite(p[1])]))
        for colour, label, points in lines
    ]
    lines = [line for line in lines if line[2]]
    if not lines:
        return ""
    points = [point for _, _, each in lines for point in each]
    across = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT, whole=True)
    up = _Axis([y for _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [_grid(across, up)]
    parts += [_line(colour, each, across, up) for colour, _, each in lines]
    named = [(colour, label) for colour, label, _ in lines if label]
    keys = "".join(
        f'<tspan fill="var(--{colour})" dx="8">● </tspan>{html.escape(label)}'
        for colour, label in named
    )
    if len(named) > 1:
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{TOP + 8}" text-anchor="end">{keys}</text>'
        )
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}" font-size="11" fill="var(--soft)">'
        f"{''.join(parts)}</svg></figure>"
    )


class _Axis:
    """Numbers to pixels, and round numbers to write beside it."""

    def __init__(self, values, start, end, whole=False):
        low, high = min(values), max(values)
        if low == high:
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        step = _round_step((high - low) / 5)
        if whole:
            step = max(1, step)
        else:
            low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        self.low, self.high, self.start, self.end = low, high, start, end
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        self.ticks = [number * step for number in range(first, last + 1)]

    def __call__(self, value):
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def _round_step(rough):
    """1, 2 or 5 times a power of ten, the least that is no less than `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))


def _grid(across, up):
    parts = []
    for value in up.ticks:
        y = up(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" '
            'stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{number(value)}</text>'
        )
    for value in across.ticks:
        parts.append(
            f'<text x="{across(value)}" y="{HEIGHT - 10}" text-anchor="middle">'
            f"{number(value)}</text>"
        )
    return "".join(parts)


def _line(colour, points, across, up):
    places = " ".join(f"{across(x)},{up(y)}" for x, y in points)
    drawn = (
        f'<polyline points="{places}" fill="none" stroke="var(--{colour})" '
        'stroke-width="1.6" stroke-linejoin="round"/>'
    )
    if len(points) > 60:
        return drawn
    return drawn + "".join(
        f'<circle cx="{across(x)}" cy="{up(y)}" r="2.6" fill="var(--{colour})">'
        f"<title>step {x:,.0f}: {y:.5g}</title></circle>"
        for x, y in points
    )


def _thinned(points):
    if len(points) <= MOST_POINTS:
        return points
    stride = len(points) / MOST_POINTS
    return [points[int(i * stride)] for i in range(MOST_POINTS - 1)] + [points[-1]]


def number(value):
    """A number as an axis shows it: `12k`, `0.25`, `2e-05`."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.4g}"
