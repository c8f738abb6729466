"""Telling of trouble: when an episode begins, when it ends, and to whom."""
