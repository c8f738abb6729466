"""Every case of the acceptance list is accounted for: with tests that exist, in a document that is up to date."""

import ast
import functools
from collections import Counter

import pytest

from tests.cases import render
from tests.cases.render import FILES, LEFT_OUT, NUMBERS, ROOT, SECTIONS, Case

DOCUMENT = ROOT / "docs" / "translation.md"
CASES = {name: render.load(name) for name in FILES}
ALL = [case for name in FILES for case in CASES[name]]
OPEN = frozenset({12, 78, 81, 157, 177, 196, 204})
"""What could be decided one way or the other."""


@functools.cache
def functions(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def is_there(test: str) -> bool:
    """Tell whether a test of that name exists, or the golden file, or the file of tests."""
    path, mark, name = test.partition("::")
    if not path.startswith("tests/") or not (ROOT / path).is_file():
        return False
    return name.startswith("test_") and name in functions(path) if mark else True


def test_every_case_is_accounted_for_once() -> None:
    counts = Counter(case.number for case in ALL)
    assert [number for number in NUMBERS if number not in counts] == [], "cases that nobody accounts for"
    assert [number for number, times in counts.items() if times > 1] == [], "cases that stand twice"
    assert [number for number in counts if number not in NUMBERS] == [], "there are no such cases"


def test_every_case_has_its_place_in_the_document() -> None:
    placed = Counter(
        case.number for _, name, numbers in SECTIONS for case in CASES[name] if case.number in numbers
    )
    assert placed == Counter(case.number for case in ALL)


@pytest.mark.parametrize("case", ALL, ids=lambda case: str(case.number))
def test_what_a_case_says_can_be_looked_up(case: Case) -> None:
    assert case.shows
    assert [test for test in case.tests if not is_there(test)] == []
    assert len(set(case.tests)) == len(case.tests)
    assert case.tests or case.decision, "a case without a test says why"


def test_what_was_open_is_decided() -> None:
    assert [case.number for case in ALL if case.number in OPEN and not case.decision] == []


def test_the_document_is_up_to_date() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert render.render(text) == text, "run `make docs`: translation.md is behind the cases"
    assert all(f"\n| {case.number} | " in text for case in ALL)
    assert all(f"`{field}`" in text for _, fields in LEFT_OUT for field in fields)


def test_an_outdated_document_would_be_noticed() -> None:
    for name in ("cases", "left-out"):
        made = render.render(f"a\n<!-- {name} -->\nold\n<!-- end -->\nb\n")
        assert made.startswith(f"a\n<!-- {name} -->\n")
        assert made.endswith("|\n<!-- end -->\nb\n")
        assert "\nold\n" not in made
        assert render.render(made) == made
    for kept in ("nothing to renew\n", "a\n<!-- cases -->\nno end\n"):
        assert render.render(kept) == kept


@pytest.mark.parametrize(
    "test",
    ["tests/test_translation_cases.py::test_of_tomorrow", "tests/test_translation_cases.py::is_there",
     "tests/gone.py::test_it", "tests/gone.json", "docs/translation.md", "tests", "test_it"],
)  # fmt: skip
def test_a_test_that_does_not_exist_is_noticed(test: str) -> None:
    assert not is_there(test)
    assert is_there("tests/test_translation_cases.py::test_a_test_that_does_not_exist_is_noticed")


@pytest.mark.parametrize(
    "entry",
    [None, [], {"case": 1, "shows": "x"}, {"case": "1", "shows": "x", "tests": []},
     {"case": 1, "shows": "x", "tests": "tests/a.py"}, {"case": 1, "shows": None, "tests": []},
     {"case": 1, "shows": "x", "tests": [], "note": "y"}],
)  # fmt: skip
def test_an_entry_of_another_shape_is_refused(entry: object) -> None:
    with pytest.raises(ValueError, match="here"):
        render._case(entry, "here")


def test_a_table_survives_what_stands_in_it() -> None:
    assert render._cell("one | two\n three") == "one \\| two three"
