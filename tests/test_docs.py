"""The documents say what the code does."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from codex_proxy import cli
from codex_proxy.config import ALERTS, GO_KEYS, KEYS, Settings, load, render_docs
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
    blocks = re.findall(r"```yaml\n(.*?)```", told_in(GUIDE), flags=re.DOTALL)
    # What Prometheus is told is not for us.
    ours = [block for block in blocks if "scrape_configs:" not in block]
    assert len(ours) > 5
    for number, block in enumerate(ours):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        assert load(path, {}).origins


def test_settings_in_the_run_of_a_sentence_are_valid() -> None:
    found = [
        (name, value)
        for name, value in re.findall(r"`([a-z-]+): ([^`\n]+)`", told_in(GUIDE))
        if name in KEYS and "..." not in value
    ]
    assert len(found) > 10
    for name, value in found:
        # YAML reads on and off as truth; the keys know that.
        KEYS[name].parse(yaml.safe_load(value))


def test_variables_of_the_environment_are_those_of_keys() -> None:
    known = {key.variable for key in KEYS.values()} | {"CODEX_PROXY_CONFIG"}
    text = told_in([*GUIDE, *(path for path in (ROOT / "deploy").rglob("*") if path.is_file())])
    named = set(re.findall(r"CODEX_PROXY_[A-Z_]*[A-Z]\b", text))
    assert len(named) > 5
    assert {name for name in named if name.removesuffix("_FILE") not in known} == set()


def test_the_guide_tells_of_every_alert() -> None:
    table = told_in([ROOT / "docs" / "operations.md"]).partition("| alert | it begins when |")[2]
    rows = re.findall(r"^\| `([a-z-]+)` \|", table.partition("\n\n")[0], flags=re.MULTILINE)
    assert rows == list(ALERTS)


def test_addresses_of_this_machine_have_the_ports_that_are_ours() -> None:
    # The daemon's, the simulator's, a login's; then those of a webhook, a collector and a SOCKS proxy.
    ports = {str(KEYS["listen"].default).lstrip(":"), "8899", "1455", "9000", "4318", "1080"}
    # The forwarder's.
    ports.add("8000")
    named = re.findall(r"(?:127\.0\.0\.1|localhost|host):(\d{4,5})", told_in(GUIDE))
    assert set(named) <= ports


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


def test_files_that_the_documents_name_exist() -> None:
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    for path in GUIDE:
        text = path.read_text(encoding="utf-8")
        # A test may be named without its folder, behind another one.
        for name in re.findall(r"`([\w/]*test_\w+\.py)`", text):
            assert any(one.endswith(f"/{name}") or one == name for one in tests), f"{path.name}: {name}"
        for name in re.findall(r"`((?:tests|deploy|codex_proxy|docs|bench)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_what_is_to_be_typed_is_the_same_in_both_languages() -> None:
    def lines(name: str) -> set[str]:
        blocks = re.findall(r"```\w*\n(.*?)```", told_in([ROOT / name]), flags=re.DOTALL)
        text = "\n".join(blocks).replace("你好", "Hello")
        # What stands behind it, for people, is in their language.
        return {re.split(r" {2,}|^# ", line.strip())[0] for line in text.splitlines()}

    english, chinese = lines("README.md"), lines("README.zh-CN.md")
    assert len(chinese) > 25
    assert chinese <= english


def slug(head: str) -> str:
    """Return the name by which a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
