"""The documents say what the code does."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from codex_proxy import cli
from codex_proxy.config import GO_KEYS, KEYS, Settings, load, render_docs
from codex_proxy.server.app import ACCOUNT_ROUTES, ROUTES, UI_ROUTES

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


# -- routes and commands ------------------------------------------------------------------

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md")])
GUIDE = [path for path in DOCUMENTS if path.name not in ("CHANGELOG.md", "CONTRIBUTING.md")]


def told_in(paths: list[Path]) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def test_every_route_is_in_the_readme() -> None:
    text = told_in([ROOT / "README.md"])
    # What the page asks for is its own business, and may be another thing tomorrow.
    routes = [route for route in (*ROUTES, *UI_ROUTES) if not route.path.startswith("/ui/")]
    missing = {
        f"{route.method} {route.path}"
        for route in routes
        if route.path != "/" and f"{re.sub('{.*', '', route.path)}" not in text
    }
    assert not missing
    assert all(route.path.startswith("/accounts/{alias}/") for route in ACCOUNT_ROUTES)
    assert "/accounts/{alias}/" in text


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_is_in_the_readme_and_explained(command: cli.Command) -> None:
    assert f"codex-proxy {command.name}" in told_in([ROOT / "README.md"])
    assert command.name in ("version",) or f"codex-proxy {command.name}" in told_in([
        path for path in GUIDE if path.parent.name == "docs"
    ])


def commands_in(path: Path) -> Iterator[str]:
    """Yield the lines of a document that call the program: in blocks of code, and between backticks."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|console|)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(codex-proxy [^`\n]*)`", text)
    for line in lines:
        if line.startswith("codex-proxy ") and "..." not in line:
            yield re.split(
                r" {2,}|\t| #| \|| >| &&|;|\[|\)", line.replace("codex-proxy [-config FILE]", "codex-proxy")
            )[0]


@pytest.mark.parametrize(
    ("document", "line"),
    sorted({(path.name, line) for path in GUIDE for line in commands_in(path)}),
)
def test_the_commands_of_the_documents_are_understood(
    document: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = shlex.split(line)[1:]
    problem = ""
    try:
        parsed = cli._parser(arguments).parse_args(arguments)
    except SystemExit as exc:
        # --help ends so too, and says what it was asked for. In the run of a sentence arguments are left out.
        said = capsys.readouterr().err
        problem = "" if exc.code == 0 or "arguments are required" in said else said
    else:
        assert isinstance(parsed, argparse.Namespace)
    assert not problem, f"{document}: {line}"


def test_a_command_that_nobody_knows_would_be_noticed() -> None:
    with pytest.raises(SystemExit):
        cli._parser(["acounts"]).parse_args(["acounts"])


def test_links_between_the_documents_lead_somewhere() -> None:
    for path in DOCUMENTS:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target or target.startswith("mailto:"):
                continue
            file, _, place = target.partition("#")
            found = (path.parent / file).resolve() if file else path
            assert found.exists(), f"{path.name}: {target}"
            if place and found.suffix == ".md":
                heads = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert place in {slug(head) for head in heads}, f"{path.name}: {target}"


def slug(head: str) -> str:
    """Return the name by which a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
