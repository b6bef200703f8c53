"""Accuracy by release as one SVG: every site a line, all sites together the strong one.

Reads and writes nothing; colours are classes of static/hub.css, so that light and dark both hold.
Never needs a script or a style attribute: the page's content security policy allows neither.
Source: SVG 1.1; values from cloud_hub.views.accuracy_by_release.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 1100, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 132, 16, 40
SITES_COLOURED = 6  # beyond these, lines are grey: more hues cannot be told apart
ALL_SITES = "all sites"


@dataclass(frozen=True)
class Point:
    """Of `heldout` reviews never trained on, `correct` were read right."""

    correct: int
    heldout: int

    @property
    def fraction(self) -> float:
        return self.correct / self.heldout


@dataclass(frozen=True)
class Line:
    """`points` has one entry per tick of the plot; None where the site had nothing to judge on."""

    name: str
    points: tuple[Point | None, ...]


def lines(judged: Sequence[dict[str, object]]) -> tuple[list[str], list[Line]]:
    """Tick labels and lines, the sum last. The first tick is the bundle that the first judged release replaced."""
    if not judged:
        return [], []
    sites = sorted({site for row in judged for site in _sites(row)})
    ticks = [f"before v{judged[0]['release_version']}", *(f"v{row['release_version']}" for row in judged)]
    made = [Line(site, _points([_sites(row).get(site) for row in judged])) for site in sites]
    return ticks, [*made, Line(ALL_SITES, _points([row["total"] for row in judged]))]


def accuracy_svg(ticks: Sequence[str], drawn: Sequence[Line]) -> Markup:
    """Empty without data."""
    if not drawn:
        return Markup("")
    floor = _floor(drawn)
    parts = [_grid(floor), _tick_labels(ticks)]
    parts += [_line(line, _class(line, index), len(ticks), floor) for index, line in enumerate(drawn)]
    parts.append(_end_labels(drawn, len(ticks), floor))
    description = f"Accuracy on held-out reviews from {ticks[0]} to {ticks[-1]}, by site"
    return Markup(
        '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg">{}</svg>'
    ).format(WIDTH, HEIGHT, description, Markup("").join(parts))


def _sites(row: dict[str, object]) -> dict[str, dict[str, int]]:
    sites = row["sites"]
    assert isinstance(sites, dict)
    return sites


def _points(accuracies: Sequence[object]) -> tuple[Point | None, ...]:
    """The state before the first judged release, then after each."""
    points: list[Point | None] = []
    for accuracy in accuracies:
        if not isinstance(accuracy, dict) or not accuracy["heldout"]:
            points.append(None)
        else:
            points.append(Point(accuracy["correct_after"], accuracy["heldout"]))
    first = accuracies[0]
    before = Point(first["correct_before"], first["heldout"]) if isinstance(first, dict) and first["heldout"] else None
    return (before, *points)


def _floor(drawn: Sequence[Line]) -> float:
    """The axis starts at 0, 0.25 or 0.5: as high as the lowest point allows."""
    lowest = min(point.fraction for line in drawn for point in line.points if point is not None)
    return max(step for step in (0.0, 0.25, 0.5) if step <= max(lowest - 0.02, 0.0))


def _x(index: int, count: int) -> float:
    width = WIDTH - LEFT - RIGHT
    return LEFT + (width / 2 if count == 1 else 14 + (width - 28) * index / (count - 1))


def _y(fraction: float, floor: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - (fraction - floor) / (1.0 - floor))


def _class(line: Line, index: int) -> str:
    if line.name == ALL_SITES:
        return "total"
    return f"site-{index + 1}" if index < SITES_COLOURED else "site-other"


def _grid(floor: float) -> Markup:
    step = 0.1 if floor == 0.5 else 0.25
    steps = [floor + step * part for part in range(round((1.0 - floor) / step) + 1)]
    row = Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
        '<text class="axis" x="{}" y="{label_y:.1f}" text-anchor="end">{label}</text>'
    )
    return Markup("").join(
        row.format(LEFT, WIDTH - RIGHT, LEFT - 8, y=_y(step, floor), label_y=_y(step, floor) + 4, label=f"{step:.0%}")
        for step in steps
    )


def _tick_labels(ticks: Sequence[str]) -> Markup:
    every = max(1, -(-len(ticks) // 12))  # at most a dozen labels
    text = Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
    shown = [index for index in range(len(ticks)) if index % every == 0 or index == len(ticks) - 1]
    return Markup("").join(text.format(_x(index, len(ticks)), HEIGHT - BOTTOM + 22, ticks[index]) for index in shown)


def _line(line: Line, css_class: str, count: int, floor: float) -> Markup:
    """A polyline over the points that are there, and a dot with its numbers on each."""
    there = [(index, point) for index, point in enumerate(line.points) if point is not None]
    path = " ".join(f"{_x(index, count):.1f},{_y(point.fraction, floor):.1f}" for index, point in there)
    dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>')
    dots = Markup("").join(
        dot.format(_x(index, count), _y(point.fraction, floor), _says(line, point)) for index, point in there
    )
    return Markup('<g class="{}"><polyline points="{}"/>{}</g>').format(css_class, path, dots)


def _says(line: Line, point: Point) -> str:
    return f"{line.name}: {point.correct} of {point.heldout} right, {point.fraction:.1%}"


def _end_labels(drawn: Sequence[Line], count: int, floor: float) -> Markup:
    """Each line's name beside its last point, pushed apart where they would overlap."""
    ends = []
    for index, line in enumerate(drawn):
        css_class = _class(line, index)
        last = next((point for point in reversed(line.points) if point is not None), None)
        if last is not None and css_class != "site-other":
            ends.append((_y(last.fraction, floor), css_class, line, last))
    ends.sort(key=lambda end: end[0])
    text = Markup('<text class="name {}-name" x="{:.1f}" y="{:.1f}">{} {}</text>')
    labels, lowest = [], -100.0
    room = len(ends)
    for y, css_class, line, last in ends:
        lowest = min(max(y, lowest + 16), HEIGHT - BOTTOM - 16 * (room - 1))
        room -= 1
        labels.append(text.format(css_class, _x(count - 1, count) + 14, lowest + 4, line.name, f"{last.fraction:.0%}"))
    return Markup("").join(labels)


def bar_svg(done: int, of: int) -> Markup:
    """A progress bar with its figures for readers of the markup."""
    fraction = 0.0 if of <= 0 else min(done / of, 1.0)
    return Markup(
        '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<rect class="bar-of" width="100" height="6" rx="3"/><rect class="bar-done" width="{:.1f}" height="6" rx="3"/></svg>'
    ).format(escape(f"{done} of {of}"), 100 * fraction)
