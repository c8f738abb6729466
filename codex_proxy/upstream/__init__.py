"""Towards the backend: targets, and the only loop over them."""
