"""`codex-proxy doctor`: what is wrong, and what to do about it."""

import argparse
import asyncio
import sys
from dataclasses import asdict

from codex_proxy import __version__, logs
from codex_proxy.commands import checks, options
from codex_proxy.commands.checks import Finding
from codex_proxy.commands.terminal import has_colour, paint, printable, say, say_json, wrapped
from codex_proxy.config import Loaded
from codex_proxy.errors import ConfigError
from codex_proxy.protocol.wire import dumps

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}

# Aligned, because most lines are short.
_LEVEL_COLUMNS = 7
_CHECK_COLUMNS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Look at the configuration, folders and files, the clock, the way to the backend and every account, and say"
        " what to do. Nothing is changed, no quota is used, and no daemon need run; one that runs is asked too."
        " Exit code 1 if there is a problem."
    )
    parser.add_argument("--offline", action="store_true", help="ask nobody outside of this machine")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Make the checks, print what they found, and return the exit code."""
    logs.setup("error")
    try:
        loaded = options.load(args)
    except ConfigError as exc:
        findings = [
            Finding("config", "problem", line, "correct it there") for line in exc.message.split("\n")
        ]
        if not args.json:
            for finding in findings:
                _show(finding)
    else:
        findings = asyncio.run(_look(loaded, is_offline=args.offline, is_shown=not args.json))
    counts = checks.summary(findings)
    if args.json:
        say_json(
            dumps({
                "version": __version__,
                "problems": counts["problem"],
                "warnings": counts["warning"],
                "findings": [asdict(finding) for finding in findings],
            })
        )
    else:
        say("", _sentence(counts["problem"], counts["warning"]))
    return 1 if counts["problem"] else 0


async def _look(loaded: Loaded, *, is_offline: bool, is_shown: bool) -> list[Finding]:
    findings: list[Finding] = []
    async with checks.patient(loaded, is_offline=is_offline) as patient:
        async for finding in checks.look(patient):
            findings.append(finding)
            if is_shown:
                _show(finding)
    return findings


def _show(finding: Finding) -> None:
    level = paint(finding.level.ljust(_LEVEL_COLUMNS), _COLOURS[finding.level], is_on=has_colour(sys.stdout))
    say(f"{level}  {finding.check.ljust(_CHECK_COLUMNS)}  {printable(finding.text)}", is_painted=True)
    if finding.advice:
        indent = " " * (_LEVEL_COLUMNS + _CHECK_COLUMNS + 4)
        say(*wrapped(f"-> {finding.advice}", 110, indent))


def _sentence(problems: int, warnings: int) -> str:
    if not problems and not warnings:
        return "Nothing is wrong."
    parts = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for count, word in ((problems, "problem"), (warnings, "warning"))
        if count
    ]
    return f"{' and '.join(parts)}."
