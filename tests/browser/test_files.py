"""The page's files by themselves: what is vendored, what is said in which language, and what they may not do."""

import hashlib
import re
from pathlib import Path

import pytest

STATIC = Path(__file__).parent.parent.parent / "codex_proxy" / "server" / "dashboard" / "static"
MODULES = sorted(path for path in STATIC.rglob("*.js") if "vendor" not in path.parts)
WORDS = STATIC / "strings.js"

# A key is followed by its two texts.
_ENTRY = re.compile(r'^  "([^"]+)": \[\s*"((?:[^"\\]|\\.)*)",\s*"((?:[^"\\]|\\.)*)",?\s*\],$', re.MULTILINE)
_PLACE = re.compile(r"\{(\w+)")
_CJK = re.compile(r"[\u3400-\u9fff\uff00-\uffef\u3000-\u303f]")


def entries() -> dict[str, tuple[str, str]]:
    return {key: (english, chinese) for key, english, chinese in _ENTRY.findall(WORDS.read_text("utf-8"))}


def code() -> str:
    return "\n".join(path.read_text("utf-8") for path in MODULES if path != WORDS)


def test_every_text_is_there_in_both_languages() -> None:
    text = WORDS.read_text("utf-8")
    found = entries()
    assert len(found) == len(re.findall(r'^  "', text, re.MULTILINE)), "an entry is no pair of texts"
    for key, (english, chinese) in found.items():
        assert english
        assert chinese
        assert set(_PLACE.findall(english)) >= set(_PLACE.findall(chinese)), key
        assert not _CJK.search(english), f"{key} is not English: {english}"
        if re.search("[A-Za-z]", re.sub(r"\{[^}]*\}", "", english)):
            assert _CJK.search(chinese) or chinese.startswith("{"), f"{key} is not Chinese: {chinese}"


def test_every_text_that_is_asked_for_exists_and_none_is_left_over() -> None:
    known = set(entries())
    said = code()
    asked = set(re.findall(r'\bt\(\s*"([^"]+)"', said))
    assert asked <= known, f"no such text: {sorted(asked - known)}"
    # Texts are also asked for by a name that stands elsewhere, or is put together.
    quoted = set(re.findall(r'"([a-z_]+(?:\.[a-z_]+)*)"', said))
    heads = tuple(re.findall(r"\bt\(\s*(?:[^`)]*\? [^`]*: )?`([^`$]+)\$\{", said))
    kinds = tuple(f"{kind}." for kind in re.findall(r'\bterm\("([^"]+)"', said))
    assert heads
    left = {key for key in known - quoted if not key.startswith((*heads, *kinds))}
    assert not left, f"nobody says {sorted(left)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_says_anything_by_itself(path: Path) -> None:
    """Words of the page stand in the table of strings; a text of several words elsewhere would have one language."""
    if path == WORDS:
        return
    text = re.sub(r"/\*.*?\*/|^\s*//.*$| // .*$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    allowed = re.compile(
        r"^(use strict|11px system-ui, sans-serif|Chat Completions|noopener noreferrer|application/json, text/event-stream"
        r"|\(prefers-color-scheme: dark\)|rotate\(45deg?\)|color-mix\(.*|[a-z_-]+( [a-z_-]+)+|0 0 [0-9 ]+|[MmLlHhVvAaCcSsZz0-9 .-]+"
        r"|[+] [0-9 ]+|[a-z]+:not.*|#.*|\[.*|expires first, worth a move|, its own cannot serve)$"
    )
    for found in re.findall(r'"([^"\n]*[A-Za-z] [A-Za-z][^"\n]*)"', text):
        assert allowed.match(found), f"{path.name} says {found!r}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_makes_markup_or_code_of_data(path: Path) -> None:
    # The name of SVG's elements is an address that nobody asks.
    text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    for forbidden in (
        "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser", "srcdoc",
        'Attribute("style"', "cssText", "://",
    ):  # fmt: skip
        assert forbidden not in text, f"{path.name}: {forbidden}"


def test_the_shell_has_nothing_inline() -> None:
    text = (STATIC / "index.html").read_text("utf-8")
    assert "style=" not in text
    assert "<style" not in text
    assert not re.search(r"\son[a-z]+=", text)
    for script in re.findall(r"<script([^>]*)>([^<]*)</script>", text):
        assert "src=" in script[0]
        assert script[1] == ""
    for address in re.findall(r'(?:src|href)="([^"]+)"', text):
        assert (STATIC / address.removeprefix("/ui/static/")).is_file(), address


def test_the_shell_asks_for_all_modules_at_once() -> None:
    """Else a browser would find them one import after the other; but for those of places that few go to."""
    text = (STATIC / "index.html").read_text("utf-8")
    preloaded = set(re.findall(r'rel="modulepreload" href="/ui/static/([^"]+)"', text))
    modules = {path.relative_to(STATIC).as_posix() for path in MODULES}
    assert preloaded == {name for name in modules if not name.startswith("gateway/")} - {"app.js", "theme.js"}


def test_every_module_that_is_imported_exists() -> None:
    for path in MODULES:
        for name in re.findall(r'(?:from |import\()"([^"]+)"', path.read_text("utf-8")):
            assert (path.parent / name).is_file(), f"{path.name} imports {name}"


def test_what_is_vendored_is_what_was_published() -> None:
    vendor = STATIC / "vendor"
    noted = dict(
        re.findall(r"^([\w.]+)  ([0-9a-f]{64})$", (vendor / "README").read_text("utf-8"), re.MULTILINE)
    )
    files = {path.name for path in vendor.iterdir()} - {"README"}
    assert set(noted) == files
    for name, digest in noted.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest, name
    assert any("LICENSE" in name for name in files)


def test_the_page_is_small() -> None:
    """It is loaded over phones too."""
    own = [path for path in STATIC.rglob("*") if "vendor" not in path.parts and path.is_file()]
    later = [path for path in own if "gateway" in path.parts]
    assert sum(path.stat().st_size for path in own if path not in later) < 250_000
    assert sum(path.stat().st_size for path in later) < 90_000
