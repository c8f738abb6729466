"""The command line: what runs, what is printed, which exit code."""

import argparse
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from codex_proxy import __version__, cli, config
from codex_proxy.errors import PoolEmpty


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and no settings in the environment."""
    monkeypatch.chdir(tmp_path)
    for key in config.KEYS.values():
        monkeypatch.delenv(key.variable, raising=False)
        monkeypatch.delenv(f"{key.variable}_FILE", raising=False)
    monkeypatch.delenv(config.CONFIG_VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[config.Loaded]:
    """What the daemon was started with, in place of starting it."""
    calls: list[config.Loaded] = []

    def run(loaded: config.Loaded) -> int:
        calls.append(loaded)
        return 0

    put_module(monkeypatch, "codex_proxy.daemon", run=run)
    return calls


def put_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "arguments", [["-config", "a.yaml"], ["--config", "a.yaml"], ["-config=a.yaml"], ["--config=a.yaml"]]
)
def test_without_a_command_the_daemon_runs_with_the_file(
    arguments: list[str], started: list[config.Loaded]
) -> None:
    write("a.yaml", "max-retry: 7\n")
    assert cli.main(arguments) == 0
    assert [(loaded.settings.max_retry, loaded.path) for loaded in started] == [(7, Path("a.yaml"))]


def test_without_arguments_the_file_of_the_working_directory_counts(started: list[config.Loaded]) -> None:
    assert cli.main([]) == 0
    write("config.yaml", "max-retry: 6\n")
    assert cli.main([]) == 0
    assert [loaded.settings.max_retry for loaded in started] == [2, 6]


def test_the_daemon_s_exit_code_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    put_module(monkeypatch, "codex_proxy.daemon", run=lambda _loaded: 1)
    assert cli.main([]) == 1


def fail_with(error: BaseException) -> Any:
    def run(_loaded: config.Loaded) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(98, "address already in use"), "address already in use"),
        (PoolEmpty("no account is loaded"), "no account is loaded"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_a_failure_at_run_time_is_a_sentence_and_exit_code_1(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_module(monkeypatch, "codex_proxy.daemon", run=fail_with(error))
    assert cli.main([]) == 1
    output = capsys.readouterr()
    assert said in output.err
    assert "Traceback" not in output.err


@pytest.mark.parametrize("command", [[], ["check"], ["key"]])
def test_a_wrong_configuration_is_exit_code_2_with_one_line_for_each_mistake(
    command: list[str], started: list[config.Loaded], capsys: pytest.CaptureFixture[str]
) -> None:
    write("config.yaml", "max-retry: 99\nlog-level: loud\n")
    assert cli.main(command) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert [line.split(" = ")[0] for line in output.err.splitlines()] == [
        "codex-proxy: config.yaml:1: max-retry",
        "codex-proxy: config.yaml:2: log-level",
    ]
    assert started == []


@pytest.mark.parametrize(
    "arguments", [["nope"], ["--nope"], ["-config"], ["check", "-x"], ["--conf", "a.yaml"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: codex-proxy" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["-h"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert all(f"    {command.name} " in output for command in cli.COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [["-config", "a.yaml", "check"], ["check", "-config", "a.yaml"], ["check", "--config=a.yaml"]],
)
def test_check_prints_what_counts_and_where_it_comes_from(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "api-keys: {laptop: sk-canary}\nproxy-url: http://u:canary@proxy.test:3128\nselector: quota-first\n"
    )
    write("a.yaml", text)
    monkeypatch.setenv("CODEX_PROXY_MAX_RETRY", "7")
    assert cli.main(arguments) == 0
    output = capsys.readouterr()
    shown = yaml.safe_load(output.out)
    assert shown == config.masked(config.load(Path("a.yaml"), {"CODEX_PROXY_MAX_RETRY": "7"}).settings)
    assert "max-retry: 7  # environment: CODEX_PROXY_MAX_RETRY" in output.out
    assert "api-keys:  # a.yaml:1\n" in output.out
    assert "connect-timeout: 10  # default" in output.out
    assert "canary" not in output.out + output.err
    assert "warning: a.yaml:3: selector" in output.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"codex-proxy {__version__}\n" * 2


def test_key_prints_the_generated_key(capsys: pytest.CaptureFixture[str]) -> None:
    write("config.yaml", "data-dir: ./kept\n")
    write("kept/client-key", "cp-generated-by-the-daemon\n")
    assert cli.main(["key"]) == 0
    assert capsys.readouterr() == ("cp-generated-by-the-daemon\n", "")


def test_key_says_when_the_generated_key_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    write("config.yaml", "api-keys: [sk-1]\n")
    write("data/client-key", "cp-generated-by-the-daemon\n")
    assert cli.main(["key"]) == 0
    output = capsys.readouterr()
    assert output.out == "cp-generated-by-the-daemon\n"
    assert "does not count" in output.err


def test_key_without_a_generated_key_says_how_one_comes_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "there is no generated key in data/client-key: the daemon makes one" in output.err


def test_a_set_up_token_is_made_anew_each_time_and_for_its_owner_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens = set()
    for _ in range(2):
        assert cli.main(["setup-token"]) == 0
        said = capsys.readouterr()
        tokens.add(said.out.strip())
        path = Path("data/setup-token")
        assert path.read_text(encoding="utf-8") == said.out
        assert path.stat().st_mode & 0o077 == 0
        assert str(path) in said.err
    assert len(tokens) == 2


@pytest.mark.parametrize("line", ["api-keys: [sk-1]", "admin-key: 0123456789abcdef"])
def test_where_a_key_was_chosen_there_is_no_set_up_token(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text(f"{line}\n", encoding="utf-8")
    assert cli.main(["setup-token"]) == 1
    assert line.partition(":")[0] in capsys.readouterr().err
    assert not Path("data/setup-token").exists()


def test_key_names_a_key_file_that_is_of_no_use(capsys: pytest.CaptureFixture[str]) -> None:
    write("data/client-key", "\n")
    assert cli.main(["key"]) == 2
    assert "data/client-key is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "module"), [("simulate", "codex_proxy.simulator.cli"), ("demo", "codex_proxy.demo")]
)
def test_a_command_of_another_room_brings_its_own_arguments(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--accounts", type=int)

    def run(args: argparse.Namespace) -> int:
        seen.append(args.accounts)
        return 0

    put_module(monkeypatch, module, add_arguments=add_arguments, run=run)
    assert cli.main([name, "--accounts", "3"]) == 0
    assert seen == [3]


@pytest.mark.parametrize("command", [["version"], ["check"], ["-h"]])
def test_python_m_runs_the_same_without_importing_servers(command: list[str], tmp_path: Path) -> None:
    """A command imports only what it needs: nobody waits for a web server to see the version."""
    program = (
        "import sys; from codex_proxy.cli import main\n"
        f"try: main({command!r})\n"
        "except SystemExit: pass\n"
        "sys.exit('aiohttp' in sys.modules)"
    )
    root = Path(cli.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_module_can_be_run(tmp_path: Path) -> None:
    root = Path(cli.__file__).parent.parent
    environ = {"PYTHONPATH": str(root), "CODEX_PROXY_MAX_RETRY": "99"}
    done = subprocess.run(
        [sys.executable, "-m", "codex_proxy", "check"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("codex-proxy: environment: CODEX_PROXY_MAX_RETRY: ")


def test_what_steers_a_terminal_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "-config", "a\x1b[2J\x9b5n.yaml"]) == cli.USAGE
    with pytest.raises(SystemExit):
        cli.main(["version", "\x1b]0;gotcha\x07"])
    output = capsys.readouterr()
    assert r"a\x1b[2J\x9b5n.yaml" in output.err
    assert r"\x1b]0;gotcha\x07" in output.err
    assert not {"\x1b", "\x9b", "\x07"} & set(output.out + output.err)
