"""`python -m codex_proxy` and the `codex-proxy` command."""

import sys

from codex_proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
