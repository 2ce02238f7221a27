"""The peak memory of a process. Needs nothing but Python."""

import sys

try:
    import resource
except ImportError:
    message = "peak memory is read by Python's `resource`, which Windows lacks: run this on Linux, macOS or WSL"
    raise SystemExit(message) from None


def peak_bytes(usage=None) -> int:
    """The largest resident set of a process, by what `os.wait4` says of its resources; by default of this one."""
    usage = usage or resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux gives KiB, macOS bytes
