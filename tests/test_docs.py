"""The documents say what the code does."""

import re
from pathlib import Path

import pytest
import yaml

from codex_proxy.config import GO_KEYS, KEYS, Settings, load, render_docs

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "config.example.yaml"
CONFIGURATION = ROOT / "docs" / "configuration.md"


def test_the_example_has_every_key_with_its_default() -> None:
    text = re.sub(r"^#(?=[a-z])", "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert yaml.safe_load(text) == {key.name: key.default for key in KEYS.values()}


def test_the_example_as_it_is_changes_nothing() -> None:
    loaded = load(EXAMPLE, {})
    assert (loaded.settings, loaded.origins, loaded.warnings) == (Settings(), {}, [])


def test_the_example_marks_the_keys_that_need_a_restart() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    for key in KEYS.values():
        start = next(number for number, line in enumerate(lines) if line.startswith(f"#{key.name}:"))
        comment = []
        while start > 0 and lines[start - 1].startswith("# "):
            start -= 1
            comment.append(lines[start])
        assert comment, f"{key.name} has no reason"
        assert ("(restart)" in " ".join(comment)) is not key.live, key.name


@pytest.mark.parametrize("document", [CONFIGURATION], ids=lambda path: path.name)
def test_generated_tables_are_up_to_date(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert render_docs(text) == text, f"run `make docs`: {document.name} is behind the code"
    assert all(f"`{name}`" in text for name in [*KEYS, *GO_KEYS])


def test_an_outdated_table_would_be_noticed() -> None:
    assert render_docs("<!-- keys -->\nold\n<!-- end -->\nrest") != "<!-- keys -->\nold\n<!-- end -->\nrest"


def test_a_table_of_keys_in_the_readme_names_only_keys_that_exist_and_their_defaults() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    rows = re.findall(r"^\| `([a-z-]+)` \| `([^`]*)`", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)
    shown = {name: default for name, default in rows if name in KEYS}
    for name, default in shown.items():
        key = KEYS[name]
        assert key.parse(yaml.safe_load(default) if key.kind != "scalar" else default) == key.parse(
            key.default
        ), name


def test_examples_in_the_documents_are_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", CONFIGURATION.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        assert load(path, {}).origins


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_lock_files_have_hashes_and_name_no_registry(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^--", text, flags=re.MULTILINE)
    requirements = re.findall(r"^[a-z0-9._-]+==.*?(?=^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert requirements
    assert all("--hash=sha256:" in requirement for requirement in requirements)


def test_every_target_of_the_makefile_that_the_documents_name_exists() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / ".ci" / "run"]:
        named = re.findall(
            r"(?:^|`)make ([a-z][a-z-]*)", document.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        assert set(named) <= targets, document.name
