"""Dialects and the wire: pure code, no await, no clock, no randomness, no logging, no aiohttp."""
