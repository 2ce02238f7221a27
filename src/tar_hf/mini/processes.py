"""Processes that run side by side, each with its share of the threads, and its name before what it prints."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

POLL = 0.1  # seconds between two looks at who has ended


class Processes:
    """
    Commands that run side by side. Those that still run when the block ends are told to end, and waited for.

    Args:
        name_lines (`bool`, *optional*, defaults to `True`): Put a process's name before each line that it prints.
            Without, it writes where this process does, progress bars and all.
    """

    def __init__(self, name_lines: bool = True):
        self.name_lines = name_lines
        self._running = {}  # name -> the process, and the threads that forward its lines

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process, _ in self._running.values():
            process.terminate()
        for process, readers in self._running.values():
            process.wait()
            for reader in readers:
                reader.join()
        self._running.clear()

    @property
    def names(self) -> set[str]:
        """Of those that have been started, and whose end nobody has been told of."""
        return set(self._running)

    def start(self, name: str, command: Sequence[str], threads: int | None = None):
        """Starts one that may use so many threads for its computations; by default as many as there are."""
        environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        if not self.name_lines:
            self._running[name] = subprocess.Popen(command, env=os.environ | environment), []
            return
        environment["PYTHONUNBUFFERED"] = "1"  # through a pipe, lines would come in blocks
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        process = subprocess.Popen(command, env=os.environ | environment, **pipes)
        pairs = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        readers = [threading.Thread(target=_forward, args=(name, *pair), daemon=True) for pair in pairs]
        for reader in readers:
            reader.start()
        self._running[name] = process, readers

    def wait(self) -> tuple[str, int]:
        """The name and exit status of the next one that ends."""
        if not self._running:
            raise RuntimeError("no process runs that could be waited for")
        while not (ended := [name for name, (process, _) in self._running.items() if process.poll() is not None]):
            time.sleep(POLL)
        process, readers = self._running.pop(ended[0])
        for reader in readers:
            reader.join()
        return ended[0], process.returncode


def _forward(name, source, target):
    with source:
        for line in map(str.rstrip, source):
            if line:
                target.write(f"[{name}] {line}\n")
                target.flush()
