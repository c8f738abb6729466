"""The tables of a run."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.perf.contenders import Contender
from bench.perf.rows import LIMITS_MS, Figures, Size, Table

TITLES = {
    "small": "small, us/request",
    "burst": "208 events, us/request",
    "paced": "paced, us/event",
    "body98k": "98 KB body, us/request",
    "body2m": "2 MB body, us/request",
    "added p50": "added p50, us",
    "added p99": "added p99, us",
    "slow": "slow stream, KB",
    "stalled": "stalled reader, MB",
}


def ratio(own: Figures, other: Figures) -> float | None:
    """Return how much more one took than another: the median of the ratios of their rounds."""
    if own.value is None or other.value is None or other.value <= 0:
        return None
    if len(own.rounds) != len(other.rounds):
        return own.value / other.value
    return statistics.median(a / b for a, b in zip(own.rounds, other.rounds, strict=True) if b > 0)


def columns(table: Table) -> dict[str, dict[str, Figures]]:
    """Return the figures by column: as measured, but for latency, of which direct is taken off."""
    made: dict[str, dict[str, Figures]] = {}
    for row, own in table.items():
        if row == "latency":
            direct = own.get("direct")
            if direct is None:
                continue
            for name, key in (("added p50", None), ("added p99", "p99")):
                base = _rounds(direct, key)
                made[name] = {
                    contender: Figures([a - b for a, b in zip(_rounds(one, key), base, strict=False)])
                    for contender, one in own.items()
                    if contender != "direct"
                }
        elif row in TITLES:
            made[row] = {name: one for name, one in own.items() if name != "direct"}
    return made


def _rounds(figures: Figures, key: str | None) -> list[float]:
    return figures.rounds if key is None else figures.extra.get(key, [])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


Grid = list[list[str]]


def _text(grid: Grid) -> str:
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    return "".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in grid
    )


def _markdown(grid: Grid) -> str:
    lines = ["| " + " | ".join(line) + " |\n" for line in grid]
    rule = "|---|" + "--:|" * (len(grid[0]) - 1) + "\n"
    return "".join([lines[0], rule, *lines[1:]])


def render(table: Table, contenders: Sequence[Contender], size: Size, *, markdown: bool = False) -> str:
    """Return everything that a run says."""
    draw: Callable[[Grid], str] = _markdown if markdown else _text
    parts: list[str] = []
    found = columns(table)
    shown = [one for one in contenders if any(one.name in own for own in found.values())]
    if found and shown:
        grid = [["", *(TITLES[name] for name in found)]]
        grid += [
            [
                one.title,
                *(_number(own[one.name].value if one.name in own else None) for own in found.values()),
            ]
            for one in shown
        ]
        parts.append("CPU time of the proxy and what else it costs\n\n" + draw(grid))
        for base, title in (("go", "the Go stand-in"), ("nginx", "nginx")):
            if any(base in own for own in found.values()):
                grid = [[f"times {title}", *(TITLES[name].partition(",")[0] for name in found)]]
                grid += [
                    [one.title, *(
                        _ratio(ratio(own[one.name], own[base]) if one.name in own and base in own else None)
                        for own in found.values()
                    )]
                    for one in shown
                ]  # fmt: skip
                parts.append(draw(grid))
    if "latency" in table:
        grid = [["one request at a time, us", "p50", "p99", "first byte p50"]]
        grid += [
            [
                one.title,
                *(
                    _number(
                        table["latency"][one.name].median(key) if key else table["latency"][one.name].value
                    )
                    for key in ("", "p99", "first")
                ),
            ]
            for one in contenders
            if one.name in table["latency"]
        ]
        parts.append(draw(grid))
    if "slow" in table:
        grid = [
            [
                f"{size.streams} slow streams, KB of the process",
                "before",
                "kept after the first time",
                "after the second",
            ]
        ]
        grid += [
            [
                one.title,
                *(
                    _number(table["slow"][one.name].median(key))
                    for key in ("base", "kept_once", "kept_twice")
                ),
            ]
            for one in contenders
            if one.name in table["slow"]
        ]
        parts.append(draw(grid))
    if "frontier" in table:
        grid = [["small requests a second", *(f"p99 < {limit} ms" for limit in LIMITS_MS)]]
        grid += [
            [one.title, *(_number(table["frontier"][one.name].median(f"p{limit}")) for limit in LIMITS_MS)]
            for one in contenders
            if one.name in table["frontier"]
        ]
        parts.append(draw(grid))
    notes = [
        f"{row}, {name}: {note}{f' ({times} times)' if times > 1 else ''}\n"
        for row, own in table.items()
        for name, one in own.items()
        for note, times in Counter(one.notes).items()
    ]
    notes += [
        f"{row}, {name}: FAILED, see below\n"
        for row, own in table.items()
        for name, one in own.items()
        if one.failure
    ]
    notes += judge(table)
    if lines := verdicts(table):
        parts.append("".join(f"- {line}" if markdown else line for line in lines))
    if notes:
        parts.append("".join(notes))
    return "\n".join(parts)


@dataclass(slots=True, frozen=True)
class Goal:
    """What is to be reached in one column."""

    column: str
    most: float
    against: str | None = None
    """Whose figure it is a multiple of; None: it is one by itself."""
    of: str = "ours-chat"
    """Who is to reach it: the whole daemon, translating Chat, or another."""


GOALS = (
    Goal("small", 1.2, "go"),
    Goal("burst", 0.6, "go"),
    Goal("paced", 1.0, "go"),
    Goal("body98k", 0.5, "go"),
    Goal("added p50", 1.6, "nginx"),
    Goal("slow", 40.0),
    Goal("stalled", 0.4),
    Goal("small", 4.0, "nginx", "forward"),
    Goal("burst", 2.0, "nginx", "forward"),
)


def verdicts(table: Table) -> list[str]:
    """Say which goals were reached, of those that were measured."""
    found = columns(table)
    lines = []
    for goal in GOALS:
        own = found.get(goal.column, {})
        if goal.of not in own or (goal.against is not None and goal.against not in own):
            continue
        value = own[goal.of].value if goal.against is None else ratio(own[goal.of], own[goal.against])
        if value is None:
            continue
        name, unit = TITLES[goal.column].rsplit(", ", 1)
        times = f"x {goal.against}" if goal.against is not None else unit
        word = "reached" if value <= goal.most else "not reached"
        whose = "" if goal.of == "ours-chat" else f"{goal.of}, "
        lines.append(f"{word}: {whose}{name} {_number(value)} {times} (at most {goal.most:g})\n")
    return lines


# What makes the stand-in one: a slow one would flatter us.
_FAIR = 7.0


def judge(table: Table) -> list[str]:
    """Say what of a run does not count."""
    small = table.get("small", {})
    if "go" in small and "nginx" in small:
        times = ratio(small["go"], small["nginx"])
        if times is not None and times > _FAIR:
            return [
                f"THIS RUN DOES NOT COUNT: the stand-in costs {times:.1f} times nginx on the small row, more than {_FAIR:.0f}.\n"
            ]
    return []
