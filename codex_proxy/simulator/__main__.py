"""`python -m codex_proxy.simulator`."""

import argparse
import sys

from codex_proxy.simulator.cli import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m codex_proxy.simulator")
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
