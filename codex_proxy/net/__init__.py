"""Outbound HTTP, once: proxy, TLS, deadlines, and foreign errors made ours."""

from codex_proxy.net.answer import Answer, Deadlines, NetError, NetKind, Reply
from codex_proxy.net.http import Outbound

__all__ = ["Answer", "Deadlines", "NetError", "NetKind", "Outbound", "Reply"]
