"""A self-hosted proxy that serves a person their own ChatGPT/Codex accounts through one address."""

__version__ = "0.1.0"
