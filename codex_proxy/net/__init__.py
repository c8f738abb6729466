"""Outbound HTTP, once: proxy, TLS, deadlines, and foreign errors made ours."""

from codex_proxy.net.http import Answer, Deadlines, NetError, NetKind, Outbound, Reply

__all__ = ["Answer", "Deadlines", "NetError", "NetKind", "Outbound", "Reply"]
