"""`codex-proxy import` as a process: what is printed, and which exit code."""

import json
from pathlib import Path

import pytest

from codex_proxy.simulator import Simulator
from tests.process import run, write_config


@pytest.fixture
def sim() -> Simulator:
    return Simulator(3)


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


async def test_everything_is_told_item_by_item_and_summed_up(tmp_path: Path, sim: Simulator) -> None:
    config = write_config(tmp_path)
    first, second, third = sim.accounts
    write(tmp_path / "go" / "jane@example.com.json", first.flat_file())
    write(tmp_path / "go" / "key.json", {"OPENAI_API_KEY": "sk-secret-1234567"})
    write(
        tmp_path / "more.jsonl", "\n".join(json.dumps(one.flat_file()) for one in (second, first)) + "\n{\n"
    )
    write(tmp_path / ".codex" / "auth.json", third.codex_file())
    paths = [str(tmp_path / name) for name in ("go", "more.jsonl", ".codex", "nowhere")]
    code, out, err = await run("import", *paths, "-config", str(config))
    assert code == 1
    assert [line.rpartition(": ")[0].replace(f"{tmp_path}/", "") for line in out.splitlines()[:-2]] == [
        "go/j***@e***.com.json: imported",
        "more.jsonl line 1: imported",
        "more.jsonl line 2: already there",
        ".codex/auth.json: imported",
    ]
    assert out.splitlines()[-2:] == [
        "7 found: 3 imported, 1 already there, 3 refused.",
        "No daemon runs with this configuration: start it with `codex-proxy`.",
    ]
    assert [line.partition(": ")[2].replace(f"{tmp_path}/", "") for line in err.splitlines()][:3] == [
        "go/key.json: refused: holds an API key and no ChatGPT login; only logins can be pooled",
        "more.jsonl line 3: refused: not JSON: Expecting property name enclosed in double quotes at column 2",
        "nowhere: refused: not readable: no such file or directory",
    ]
    assert "warning:" in err
    warning = [line for line in err.splitlines()[3:] if str(tmp_path) not in line]
    assert max(map(len, warning)) <= 78
    words = err.replace("\ncodex-proxy: ", " ")
    assert ".codex/auth.json may still be in use by a Codex CLI. A refresh token works once" in words
    assert "`codex-proxy login`: the pool then has a login of its own" in words
    for secret in ("sk-secret", first.tokens.refresh, first.email):
        assert secret not in out + err

    code, out, err = await run("import", *paths[:1], paths[2], "-config", str(config))
    assert code == 1
    assert out.splitlines()[-1] == "3 found: 2 already there, 1 refused."
    # What was not taken over is shared by nobody.
    assert "warning" not in err


async def test_an_import_of_nothing_but_good_accounts_succeeds(tmp_path: Path, sim: Simulator) -> None:
    config = write_config(tmp_path)
    sim.write_auth_files(tmp_path / "from")
    code, out, err = await run("-config", str(config), "import", str(tmp_path / "from"))
    assert (code, err) == (0, "")
    assert out.splitlines()[-2] == "3 found: 3 imported."
    assert len(list((tmp_path / "auths").glob("*.json"))) == 3
