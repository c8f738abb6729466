"""What people install: wheel, source, image and units hold everything, and say what they should."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from codex_proxy import __version__
from codex_proxy.accounts.upkeep import EXCHANGE_SECONDS
from codex_proxy.config import KEYS
from codex_proxy.forwarder.settings import load as forwarding

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
ENTRY = "[console_scripts]\ncodex-proxy = codex_proxy.__main__:main\n"

# A drain in full, then a token exchange in full.
END_SECONDS = float(str(KEYS["drain-timeout"].default)) + EXCHANGE_SECONDS


# -- wheel and source ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return folder


def files_of_the_package() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "codex_proxy").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".pyc", ".swp"}
    }


def test_the_wheel_has_every_file_of_the_package_and_no_other(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"codex_proxy-{__version__}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        ranks = archive.getinfo("codex_proxy/data/o200k_base.tiktoken.gz").file_size
    packed = {name for name in names if not name.startswith(info)}
    assert packed == files_of_the_package()
    assert {path.rpartition(".")[2] for path in packed} >= {"py", "gz", "html", "css", "js"}
    assert ranks > 1_000_000
    assert entry_points == ENTRY
    assert f"{info}/licenses/LICENSE" in names
    assert "License-Expression: MIT" in metadata
    assert f"Version: {__version__}" in metadata
    assert re.search(r"^Requires-Python: >=3\.11$", metadata, flags=re.MULTILINE)
    assert "Home-page" not in metadata


def test_the_source_has_what_building_testing_and_running_it_needs(built: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of_the_package() <= names
    for name in (
        "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "config.example.yaml", "requirements.lock",
        "deploy/Dockerfile", "deploy/compose.yaml", "deploy/systemd/codex-proxy.service", "docs/configuration.md",
        "tests/conftest.py", "tests/harness.py",
    ):  # fmt: skip
        assert name in names, name
    assert not {name for name in names if name.startswith(("auths/", "data/", ".git/", ".venv/"))}


@pytest.mark.clients
@pytest.mark.timeout(600)
def test_the_wheel_works_in_a_clean_environment(built: Path, tmp_path: Path) -> None:
    """As pipx and uvx install it: with what it asks for and nothing of this checkout."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    bin_ = tmp_path / "venv" / "bin"
    subprocess.run(
        [bin_ / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)],
        cwd=tmp_path, check=True, timeout=500,
    )  # fmt: skip

    def run(*arguments: str) -> str:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("CODEX", "PYTHON"))
        }
        done = subprocess.run(
            [bin_ / "codex-proxy", *arguments],
            cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    assert run("version") == f"codex-proxy {__version__}\n"
    assert "these settings count" in run("check")
    assert run("demo", "--once").count("HTTP 200") == 4
    assert "usage: codex-proxy" in run("--help")
    # What only the counting process reads.
    count = "from codex_proxy.server.encoding import *; import codex_proxy, pathlib; print(pathlib.Path(codex_proxy.__file__).parent)"
    where = subprocess.run(
        [bin_ / "python", "-c", count], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()
    assert Path(where).is_relative_to(tmp_path)


# -- the image ----------------------------------------------------------------------------


def instructions(text: str) -> list[tuple[str, str]]:
    """Take a Dockerfile apart: the word of each instruction and what follows it."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip())
        for line in joined.splitlines()
        if line.strip()
        for word, _, rest in [line.strip().partition(" ")]
    ]


DOCKERFILE = instructions((DEPLOY / "Dockerfile").read_text(encoding="utf-8"))


def stage(number: int) -> list[tuple[str, str]]:
    starts = [place for place, (word, _) in enumerate(DOCKERFILE) if word == "FROM"]
    return DOCKERFILE[starts[number] : [*starts, len(DOCKERFILE)][number % len(starts) + 1]]


def only(found: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for name, rest in found if name == word]


def test_the_image_is_made_in_two_stages_from_a_named_version() -> None:
    assert len(only(DOCKERFILE, "FROM")) == 2
    (python,) = only(DOCKERFILE, "ARG")
    assert re.fullmatch(r"PYTHON=3\.\d+-slim-\w+", python), "neither latest nor without a version"
    assert all(rest.startswith("python:${PYTHON}") for rest in only(DOCKERFILE, "FROM"))
    assert not only(DOCKERFILE, "ADD"), "COPY does one thing"
    assert not any("sudo" in rest or "apt-get" in rest or "curl" in rest for rest in only(DOCKERFILE, "RUN"))


def test_the_image_takes_only_what_was_pinned() -> None:
    installs = [part for rest in only(stage(0), "RUN") for part in rest.split("&&") if "pip install" in part]
    assert installs
    assert all("--require-hashes" in part or "--no-deps" in part for part in installs)
    assert not any("pip" in rest for rest in only(stage(1), "RUN"))


def test_the_lock_has_all_that_the_package_asks_for() -> None:
    """The image installs the package without looking at what it needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    locked = {plain(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", lock, flags=re.MULTILINE)}
    wanted = {plain(re.split(r"[^A-Za-z0-9._-]", text)[0]) for text in project["dependencies"]}
    assert wanted <= locked, "run make lock"


def test_the_image_runs_as_nobody_in_particular_and_ends_as_told() -> None:
    last = stage(1)
    users = only(last, "USER")
    assert [user for user in users if re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)] == users[-1:], (
        "by number, so that Kubernetes can see that it is not root"
    )
    after = last[last.index(("USER", users[-1])) :]
    assert not only(after, "RUN")
    assert json.loads(only(last, "ENTRYPOINT")[0]) == ["codex-proxy"], "a shell would keep signals to itself"
    assert json.loads(only(last, "VOLUME")[0]) == ["/auths", "/data"]
    assert only(last, "STOPSIGNAL") == ["SIGTERM"]


def test_the_image_looks_after_itself() -> None:
    (check,) = only(stage(1), "HEALTHCHECK")
    options, _, command = check.partition(" CMD ")
    assert json.loads(command) == ["codex-proxy", "healthcheck"]
    timeout = re.search(r"--timeout=(\d+)s", options)
    assert timeout is not None
    # Ours ends first, and says why.
    assert int(timeout[1]) > 5


def test_the_image_gets_what_it_copies_and_nothing_secret() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in ignored if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {line[1:] for line in patterns if line.startswith("!")}
    copied: set[str] = set()
    for rest in only(stage(0), "COPY"):
        *sources, _ = rest.split()
        copied |= {source.removeprefix("./") for source in sources}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    # What the build needs: the metadata names these.
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'readme = "README.md"' in project
    assert {"README.md", "LICENSE"} <= copied


def test_settings_in_the_deployment_files_exist() -> None:
    known = {key.variable for key in KEYS.values()}
    named: set[str] = set()
    for path in (DEPLOY / "Dockerfile", DEPLOY / "compose.yaml", DEPLOY / "systemd" / "codex-proxy.service"):
        found = set(re.findall(r"CODEX_PROXY_[A-Z_]+", path.read_text(encoding="utf-8")))
        assert found <= known, path.name
        named |= found
    assert named == {"CODEX_PROXY_AUTH_DIR", "CODEX_PROXY_DATA_DIR"}, "more would beat what the file says"


def test_compose_gives_it_as_little_as_it_needs() -> None:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    service = document["services"]["codex-proxy"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all("noexec" in mount for mount in service["tmpfs"])
    assert not {"privileged", "cap_add", "network_mode", "pid", "user"} & service.keys()
    assert [port for port in service["ports"] if not port.startswith("127.0.0.1:")] == []
    assert int(service["stop_grace_period"].removesuffix("s")) > END_SECONDS
    assert service["ulimits"]["nofile"]["hard"] >= 65_536
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    assert mounts == {"auths": "/auths", "data": "/data"}
    assert set(document["volumes"]) == set(mounts)
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()


# -- the units ----------------------------------------------------------------------------

UNITS = DEPLOY / "systemd"


def unit(name: str) -> dict[str, dict[str, list[str]]]:
    """Read a unit: every value of every key, in order."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return found


def test_the_service_says_when_it_is_ready_and_has_time_to_end() -> None:
    service = unit("codex-proxy.service")["Service"]
    assert service["Type"] == ["notify"]
    # Only so can a restart name the new process.
    assert service["NotifyAccess"] == ["main"]
    assert int(service["TimeoutStopSec"][0]) > END_SECONDS
    assert int(service["LimitNOFILE"][0]) >= 65_536
    assert "-HUP" in service["ExecReload"][0]
    assert service["ProtectSystem"] == ["strict"]
    assert service["CapabilityBoundingSet"] == [""]
    assert service["NoNewPrivileges"] == ["yes"]
    # It belongs to root, whatever the user: with less than 755 the service could not even enter it.
    assert service["WorkingDirectory"] == [f"/etc/{service['ConfigurationDirectory'][0]}"]
    assert "ConfigurationDirectoryMode" not in service
    # The library that counts open files and memory reads /proc/stat first, and is silent without it.
    assert "ProcSubset" not in service
    # Files that it makes are where it may write.
    state = f"/var/lib/{service['StateDirectory'][0]}/"
    assert all(value.partition("=")[2].startswith(state) for value in service["Environment"])


def test_the_socket_is_for_this_machine_and_hands_over_one_listener() -> None:
    sock = unit("codex-proxy.socket")["Socket"]
    assert sock["Accept"] == ["no"]
    assert sock["ListenStream"] == ["127.0.0.1:8080", "[::1]:8080"]


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they would be on a machine that has the program and the user."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze on this machine")
    for name in ("codex-proxy.service", "codex-proxy.socket", "codex-proxy-forward.service"):
        text = (UNITS / name).read_text(encoding="utf-8")
        text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE)
        text = re.sub(r"^(User|Group)=.*", r"\1=root", text, flags=re.MULTILINE)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_systemd_understands_every_line(units: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(units.glob("codex-proxy*")))],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "codex-proxy" in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.parametrize("name", ["codex-proxy", "codex-proxy-forward"])
def test_systemd_finds_little_that_could_be_taken_away(units: Path, name: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", str(units / f"{name}.service")],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at a file")
    overall = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert overall is not None, done.stderr
    # Root here; the unit's own user takes another 0.4 off.
    assert float(overall[1]) <= 2.5


def test_the_forwarder_runs_as_nobody_in_particular_and_has_time_to_end() -> None:
    service = unit("codex-proxy-forward.service")["Service"]
    assert service["DynamicUser"] == ["yes"]
    assert "User" not in service
    assert int(service["TimeoutStopSec"][0]) > forwarding({"upstream": ["http://far.test"]}, {}).drain_timeout
    assert service["CapabilityBoundingSet"] == [""]


def test_the_user_of_the_unit_is_the_one_that_is_made() -> None:
    words = [
        line.split()
        for line in (UNITS / "codex-proxy.sysusers").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert [(row[0], row[1]) for row in words] == [("u", unit("codex-proxy.service")["Service"]["User"][0])]
