"""
The plot of the README: receipts per second by the number of threads, ours and others, on a good disk and on a till's.

Made from the JSON of `bench.py`: plot.py FIGURES.json SPEED.svg. Colours and text can be read on white and on black.
"""

import json
import math
import sys
from html import escape
from pathlib import Path

PANELS = {"peers": "On a good disk", "till-peers": "On a till's disk: each sync takes 2 ms longer"}
WIDTH, HEIGHT = 890, 350
LEFT, TOP, PANEL, PANEL_HEIGHT = 52, 84, 250, 216  # of a panel's axes
LABELS = 142  # the room for the names at the right of a panel
TEXT, GRID, OURS = "#78818b", "#8c959f", "#e8590c"
LINE_HEIGHT = 17
# Of each side: colour, width, dashes.
STYLES = {
    "ours": (OURS, 3.5, "none"),
    "plain sqlite3": ("#3b82c4", 2, "6 4"),
    "litequeue": (TEXT, 1.8, "none"),
    "huey": (TEXT, 1.8, "2 4"),
    "persist-queue": (TEXT, 1.8, "9 3 2 3"),
}


def write(path, rows):
    """Write the plot of what `as_dict` of rows returns, with the section of each."""
    path.write_text("\n".join(svg(rows)) + "\n")


def svg(rows):
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    yield "<title>Durable inserts per second by threads: ours, plain sqlite3, litequeue, huey, persist-queue</title>"
    yield _text(8, 24, "Receipts per second by threads, each on disk before its call returns", size=17, weight="bold")
    for number, (section, title) in enumerate(PANELS.items()):
        yield from _panel(LEFT + number * (PANEL + LABELS + LEFT), title, _series(rows, section))
    yield "</svg>"


def _series(rows, section):
    """Of each side, its rate by threads."""
    found = {name: {} for name in STYLES}
    for row in rows:
        if row["section"] == section and row["point"]:
            threads, name = row["point"]
            found["ours"][threads] = row["ours"]["median"]
            found[name][threads] = row["reference"]["median"]
    return found


def _panel(left, title, series):
    yield _text(left, TOP - 26, title, size=14, weight="bold")
    threads = sorted(series["ours"])
    if not threads:
        yield _text(left, TOP + 20, "not measured: there was no strace")
        return
    step = _step(max(max(rates.values()) for rates in series.values()))
    top = 4 * step
    bottom = TOP + PANEL_HEIGHT
    for tick in range(5):
        y = bottom - PANEL_HEIGHT * tick / 4
        yield f'<path d="M{left} {y:.0f}h{PANEL}" stroke="{GRID}" stroke-opacity="{0.9 if tick == 0 else 0.35}"/>'
        yield _text(left - 6, y + 4, f"{tick * step:,}", anchor="end")
    x_of = {count: left + 12 + (PANEL - 24) * place / (len(threads) - 1) for place, count in enumerate(threads)}
    for count, x in x_of.items():
        yield _text(x, bottom + 18, f"{count}", anchor="middle")
    yield _text(left + PANEL / 2, bottom + 37, "threads", anchor="middle")
    for name, rates in reversed(series.items()):  # ours above the others
        points = [(x_of[count], bottom - PANEL_HEIGHT * rate / top) for count, rate in sorted(rates.items())]
        colour, width, dashes = STYLES[name]
        style = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"'
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{line}" {style}/>'
        for x, y in points:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 0.7:.1f}" fill="{colour}"/>'
    last = {name: rates[threads[-1]] for name, rates in series.items()}
    for name, y in _apart({name: bottom - PANEL_HEIGHT * rate / top for name, rate in last.items()}, bottom).items():
        weight = "bold" if name == "ours" else "normal"
        told = "kkt-buffer" if name == "ours" else name
        yield _text(left + PANEL + 4, y + 4, f"{last[name]:,.0f} {told}", colour=STYLES[name][0], weight=weight)


def _step(most):
    """The distance of four ticks, a round number, so that the highest one is above `most`."""
    magnitude = 10 ** math.floor(math.log10(most / 4))
    return next(
        int(magnitude * factor) for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if 4 * magnitude * factor >= most
    )


def _apart(heights, bottom):
    """The heights of the labels, moved up until none covers another."""
    placed, free = {}, bottom
    for name in sorted(heights, key=heights.get, reverse=True):  # from the bottom on
        placed[name] = min(heights[name], free)
        free = placed[name] - LINE_HEIGHT
    return placed


def _text(x, y, text, *, size=13, anchor="start", weight="normal", colour=TEXT):
    where = f'x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {where} fill="{colour}">{escape(text)}</text>'


if __name__ == "__main__":
    write(Path(sys.argv[2]), json.loads(Path(sys.argv[1]).read_text())["rows"])
