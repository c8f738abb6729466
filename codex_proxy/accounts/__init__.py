"""Accounts: files, tokens, quota, states, and which one serves next. Decide first, then do I/O."""
