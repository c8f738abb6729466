"""What `codex-proxy restart` says of what became of it; how it is done is told in daemon/test_hand_over.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from codex_proxy import cli
from codex_proxy.commands import restart
from codex_proxy.config import Settings
from codex_proxy.protocol.wire import JsonObject
from tests.process import write_config

DONE: JsonObject = {
    "success": True,
    "message": "process 8 serves now; 7 ends when its streams have",
    "pid": 8,
    "seconds": 1.25,
    "held_seconds": 0.02,
}


def answer(monkeypatch: pytest.MonkeyPatch, outcome: JsonObject) -> None:
    async def ask(_: Settings) -> JsonObject:
        return outcome

    monkeypatch.setattr(restart, "_ask", ask)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return ["restart", "-config", str(write_config(tmp_path))]


def test_a_success(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    answer(monkeypatch, DONE)
    assert cli.main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        "process 8 serves now; 7 ends when its streams have.",
        "It took 1.25 s; newcomers waited 0.02 s of them.",
    ]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == DONE


def test_a_failure_is_told_with_what_the_new_process_said(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines = ["ERROR not started: cannot listen on :8080: in use", "\x1b[31mred"]
    answer(monkeypatch, {"success": False, "message": "the new process ended with exit code 1", "log": lines})
    assert cli.main(command) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "codex-proxy: not restarted, the daemon goes on as before: the new process ended with exit code 1",
        "codex-proxy: the last that the new process said:",
        "codex-proxy:   ERROR not started: cannot listen on :8080: in use",
        "codex-proxy:   \\x1b[31mred",
    ]


def test_without_a_daemon_there_is_nothing_to_restart(command: list[str], capsys: Any) -> None:
    assert cli.main(command) == 1
    assert "no daemon answers at" in capsys.readouterr().err
