"""Whose the files of a volume are, where not all who work on them run as the volume's own user.

A volume belongs to its owner's uid and gid alone until a container that runs as another user may write to it. From
then on it is the group's: that container is in the group, what is made there gets it, and whoever makes a file
leaves it open to the group. What a program closes to its group by intention (a key, a database) stays closed.
"""

from __future__ import annotations

import os
import stat
import struct
from contextlib import suppress

ALONE = 0o750
_TOGETHER = 0o2770
_ANY_TYPE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def is_shared(volume: int) -> bool:
    """Whether `share` was called for the directory that ``volume`` is a descriptor of."""
    return bool(os.fstat(volume).st_mode & stat.S_ISGID)


def open_to_group(directory: int, mode: int = _TOGETHER) -> None:
    """Let the group have all that is made in ``directory`` (a descriptor) from now on."""
    os.fchmod(directory, mode | stat.S_ISGID)
    # Whoever makes a file there has a umask that leaves its group out, but for this. Where the filesystem has no
    # ACLs, users that share files have to open them to the group themselves.
    with suppress(OSError):
        os.setxattr(directory, "system.posix_acl_default", _GROUP_ACL)


def share(volume: int, gid: int) -> None:
    """Open a volume, of which ``volume`` is a descriptor, to its group: what is there, and what will be.

    To be repeated: programs set modes, too. Containers may be at work there meanwhile, so no name is used twice.
    """
    open_to_group(volume)
    for _, directories, files, directory in os.fwalk(".", dir_fd=volume, follow_symlinks=False):
        with suppress(OSError):
            _share_directory(directory, gid)
        if not os.fstat(directory).st_mode & stat.S_IRGRP:
            directories.clear()
            continue
        for name in files:
            with suppress(OSError):  # gone meanwhile, or made immutable
                _share_file(directory, name, gid)


def _share_directory(directory: int, gid: int) -> None:
    found = os.fstat(directory)
    if found.st_gid != gid:
        os.fchown(directory, -1, gid)
    mode = _as_owner(found.st_mode)
    if mode & stat.S_IRGRP and (not mode & stat.S_ISGID or mode != stat.S_IMODE(found.st_mode)):
        open_to_group(directory, mode)


def _share_file(directory: int, name: str, gid: int) -> None:
    descriptor = os.open(name, _ANY_TYPE, dir_fd=directory)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return
        path = f"/proc/self/fd/{descriptor}"  # the file itself, whatever has its name by now
        if found.st_gid != gid:
            os.chown(path, -1, gid)
        mode = _as_owner(found.st_mode)
        if mode != stat.S_IMODE(found.st_mode):
            os.chmod(path, mode)
    finally:
        os.close(descriptor)


def _as_owner(mode: int) -> int:
    """``mode`` with the owner's rights for the group too, if that may read at all."""
    mode = stat.S_IMODE(mode)
    return mode | (mode & stat.S_IRWXU) >> 3 if mode & stat.S_IRGRP else mode


def _acl(*entries: tuple[int, int]) -> bytes:
    """A POSIX ACL as the kernel takes it (linux/posix_acl_xattr.h): version 2, then tag, rights, and no id."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, rights, 0xFFFFFFFF) for tag, rights in entries)


_GROUP_ACL = _acl((0x01, 7), (0x04, 7), (0x20, 0))  # the owning user and group everything, others nothing
