"""How much memory this process has used at most."""

from __future__ import annotations

import re
from pathlib import Path


def peak_rss_mb() -> float:
    """Return the peak resident memory of this process in MiB; 0 where the system does not tell.

    ``getrusage`` is of no use in a child: on Linux its figure starts from the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else 0.0
