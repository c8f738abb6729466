"""The Codex backend and its OAuth issuer, played locally: for tests, the demo, and trying clients."""

from codex_proxy.simulator.account import SimAccount, Window
from codex_proxy.simulator.exchange import Received
from codex_proxy.simulator.script import Script
from codex_proxy.simulator.server import Simulator

__all__ = ["Received", "Script", "SimAccount", "Simulator", "Window"]
