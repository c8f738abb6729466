"""What work costs, counted: calls do not depend on the machine, or on what else it does."""

import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Self

import codex_proxy

OURS = str(Path(codex_proxy.__file__).parent)


class Calls:
    """Counts the calls of functions while it is entered; a generator that goes on counts too."""

    def __init__(self) -> None:
        self.by_code: Counter[CodeType] = Counter()
        """Those of functions in Python."""
        self.in_c = 0
        """Those of others."""

    def __enter__(self) -> Self:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self.by_code[frame.f_code] += 1
        elif event == "c_call":
            self.in_c += 1

    def ours(self) -> Counter[CodeType]:
        """Return those of the package's own functions."""
        return Counter({
            code: count for code, count in self.by_code.items() if code.co_filename.startswith(OURS)
        })
