"""The rows as tables in Markdown, aligned so that a terminal shows them as well."""

HEAD = """\
# How fast it is

Written by `make bench`: a section for each module of this folder, whose docstring says what is compared with what.
Times are medians of paired rounds, and `p99` is of the single calls. `CPU` is the processor time of the whole process
for a call, or for a receipt, in µs. `syncs` is how often that waited for the disk, counted on a till's disk, where each
sync takes 2 ms longer. The ratio is ours to the other side, and the goal is for the ratio unless it has a unit.
"""
WIDTHS = (50, 10, 7, 7, 6, 5, 10, 7, 6, 5, 6, 16)


def write(path, lines, machine):
    path.write_text("\n".join([HEAD + f"\n{machine}.", *lines]) + "\n")


def tables(sections):
    """The lines of all tables."""
    for section in sections:
        yield from ("", f"## {section.title[0].upper()}{section.title[1:]}", "")
        if section.left_out:
            yield section.left_out
            continue
        side = ("p99", "CPU", "syncs")
        yield _line("", "unit", "ours", *side, section.reference, *side, "ratio", "goal")
        yield "|" + "|".join(f"{'':-<{width + 1}}{':' if place else '-'}" for place, width in enumerate(WIDTHS)) + "|"
        for row in section.rows:
            yield _line(row.what, row.unit, *_side(row.ours), *_side(row.reference), _number(row.ratio), _goal(row))


def _line(*cells):
    padded = [f"{cell:{'>' if place else '<'}{WIDTHS[place]}}" for place, cell in enumerate(cells)]
    return f"| {' | '.join(padded)} |"


def _side(figures):
    return [_number(value) for value in figures] if figures else ["-"] * 4


def _goal(row):
    if row.budget is None:
        return ""
    of = "p99 " if row.compares == "p99" else ""
    goal = f"{of}{'≥' if row.at_least else '≤'} {row.budget:g}{' ' + row.unit if row.absolute else ''}"
    return f"{goal}: missed" if row.missed else goal


def _number(value):
    """Three digits of it, or more before the point."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"
