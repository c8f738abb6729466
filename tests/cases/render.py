"""Write the generated parts of docs/translation.md: what is left out, and the table of cases.

`python -m tests.cases.render docs/translation.md` renews a document in place; `make docs` does that.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from codex_proxy.protocol import chat_request, completions, messages_request, responses_request

ROOT = Path(__file__).parent.parent.parent
FILES = ("chat", "messages", "responses", "legacy")
"""The files of cases; each is a list of mappings with `case`, `shows`, `tests` and perhaps `decision`."""

NUMBERS = range(1, 205)
"""All cases there are."""

SECTIONS: tuple[tuple[str, str, range], ...] = (
    ("Chat Completions: requests", "chat", range(1, 65)),
    ("Chat Completions: streams", "chat", range(65, 91)),
    ("Chat Completions: plain answers", "chat", range(91, 100)),
    ("Text completion and edits", "legacy", NUMBERS),
    ("Messages: requests", "messages", range(100, 137)),
    ("Messages: streams", "messages", range(137, 167)),
    ("Messages: plain answers, errors, counting", "messages", range(167, 175)),
    ("Responses and compaction", "responses", range(175, 197)),
    ("Around the translation", "responses", range(197, 205)),
)
"""Title, file, and which of its cases."""

LEFT_OUT: tuple[tuple[str, Iterable[str]], ...] = (
    ("Responses", responses_request.LEFT_OUT),
    ("Chat Completions", chat_request.LEFT_OUT),
    ("Messages", messages_request.LEFT_OUT),
    ("Text completion, edits", completions.LEFT_OUT),
)


@dataclass(slots=True, frozen=True)
class Case:
    """What is done about one case of the acceptance list."""

    number: int
    shows: str
    tests: tuple[str, ...]
    """`path::function`, or the path of a golden file or of a whole test file."""
    decision: str = ""


def load(name: str) -> list[Case]:
    """Return the cases of one file, in its order; none when it is not there.

    Raises:
        ValueError: If an entry has another shape.
    """
    path = Path(__file__).parent / f"{name}.yaml"
    entries: Any = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else []
    return [_case(entry, f"{path.name}, entry {place}") for place, entry in enumerate(entries)]


def _case(entry: Any, where: str) -> Case:
    if not isinstance(entry, dict) or not {"case", "shows", "tests"} <= set(entry) <= {
        "case", "shows", "tests", "decision",
    }:  # fmt: skip
        raise ValueError(f"{where}: an entry has case, shows, tests and perhaps a decision")
    number, shows, tests, decision = (
        entry["case"],
        entry["shows"],
        entry["tests"],
        entry.get("decision") or "",
    )
    if not isinstance(number, int) or not isinstance(shows, str) or not isinstance(decision, str):
        raise ValueError(f"{where}: case is a number, shows and decision are texts")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"{where}: tests is a list of texts")
    return Case(number, shows.strip(), tuple(tests), decision.strip())


def render(text: str) -> str:
    """Return a document with its generated parts renewed.

    They stand between `<!-- left-out -->` or `<!-- cases -->` and `<!-- end -->`.
    """
    for name, lines in (("left-out", _left_out()), ("cases", _tables())):
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if start and end:
            text = "".join([before, start, *(f"{line}\n" for line in lines), end, after])
    return text


def _left_out() -> Iterator[str]:
    yield "| API | left out |"
    yield "|---|---|"
    for title, fields in LEFT_OUT:
        yield f"| {title} | {', '.join(f'`{field}`' for field in sorted(fields))} |"


def _tables() -> Iterator[str]:
    for place, (title, name, numbers) in enumerate(SECTIONS):
        if place:
            yield ""
        yield f"### {title}"
        yield ""
        yield "| case | what we do | decision | where tested |"
        yield "|---|---|---|---|"
        for case in sorted(load(name), key=lambda case: case.number):
            if case.number in numbers:
                cells = (_cell(case.shows), _cell(case.decision), "<br>".join(_tested(case.tests)))
                yield f"| {case.number} | {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _tested(tests: Iterable[str]) -> Iterator[str]:
    """Yield each file as a link, with the tests in it that are meant."""
    files: dict[str, list[str]] = {}
    for test in tests:
        path, _, function = test.partition("::")
        files.setdefault(path, []).extend([function] if function else [])
    for path, functions in files.items():
        # An example file is named by what it shows; of tests, the file says what they are about.
        label = path.removeprefix("tests/") if path.endswith(".py") else Path(path).stem
        link = f"[{label}](../{path})"
        yield f"{link}: {', '.join(f'`{name}`' for name in functions)}" if functions else link


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        document = Path(argument)
        document.write_text(render(document.read_text(encoding="utf-8")), encoding="utf-8")
