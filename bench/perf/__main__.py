"""Run the bench: `python -m bench.perf`, or `make bench`."""

import sys

from bench.perf.cli import main

if __name__ == "__main__":
    sys.exit(main())
