"""Limits on the archives that are opened, checked by what their directory declares before anything is unpacked.

Deflate packs a thousand zeros into one byte, and an archive may name any number of members: a file of a few megabytes can fill a disk.
Nothing here trusts the declared sizes beyond that; a member that is longer than it says is cut off by ``zipfile`` and found damaged.
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

# A calibration set of ten thousand images of 3x512x512 in FP32 has 31 GB.
MOST_BYTES = 64 * 2**30
MOST_MEMBERS = 4096
# What must lie in memory at once: a row, or an array that is stored column by column.
MOST_AT_ONCE = 4 * 2**30


def check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse an archive that declares more than a data set has.

    Raises:
        UsageError: for too many members, too many bytes, or two members of one name.
    """
    members = archive.infolist()
    declared = sum(member.file_size for member in members)
    names = [member.filename for member in members]
    fix = "give an archive of fewer and smaller arrays, or a directory of several"
    if len(members) > MOST_MEMBERS:
        raise UsageError(f"the archive has {len(members)} members, and at most {MOST_MEMBERS} are read", at=f"'{path}'", fix=fix)
    if declared > MOST_BYTES:
        what = f"the archive declares {declared / 2**30:.0f} GiB unpacked, and at most {MOST_BYTES / 2**30:.0f} are read"
        raise UsageError(what, at=f"'{path}'", fix=fix)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"the archive has two members '{twice}'", at=f"'{path}'", fix="save it again with every array once")


def check_block(size: int, at: str) -> None:
    """Refuse to read ``size`` bytes of one array at once.

    Raises:
        UsageError: when that is more than any sample has.
    """
    if size > MOST_AT_ONCE:
        what = f"{size / 2**30:.0f} GiB of this array would have to be read at once, and at most {MOST_AT_ONCE / 2**30:.0f} are"
        raise UsageError(what, at=at, fix="save the samples along the first dimension, in C order (np.ascontiguousarray)")
