"""The right to write the databases of a data-dir: one process has it at a time.

The lock is on a file beside them, never on one that is replaced. It ends with the process that has it, however
that ends.
"""

import fcntl
import os
import threading
from pathlib import Path

FILE = "store.lock"


class StoreLock:
    """One process's hold on the lock, shared by all its stores."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._descriptor: int | None = None
        self._holders: set[str] = set()
        self._guard = threading.Lock()

    def acquire(self, holder: str) -> bool:
        """Take it for *holder*, or find that it has it already; False while another process has it.

        Raises:
            OSError: If the file cannot be opened or locked at all.
        """
        with self._guard:
            if self._descriptor is None:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                    return False
                except BaseException:
                    os.close(descriptor)
                    raise
                self._descriptor = descriptor
            self._holders.add(holder)
            return True

    def release(self, holder: str) -> None:
        """Give it back for *holder*; another process may take it when nobody here holds it any more."""
        with self._guard:
            self._holders.discard(holder)
            if not self._holders and self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
