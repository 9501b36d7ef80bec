"""Private folders and keyed checksums for files that are executed, such as compiled programs and libraries.

A folder is private if it belongs to this user, nobody else may write to it, and no other user can replace it: each
parent folder belongs to this user or to root, and only its owner may write to it. (A sticky folder such as /tmp is
allowed, because others cannot rename its entries.) The name of each file contains its checksum, and the key of the
checksums is in the same folder. So a damaged file, or one that was copied from elsewhere, is recognised.
"""

import contextlib
import grp
import hmac
import os
import pwd
import re
import secrets
import stat
from pathlib import Path

from gptjax.files import publish, sync, temporary_name

KEY_FILE = "key"
KEY_BYTES = 32
LIBRARY = ".so"
SIGNED = re.compile(r"(.*)\.[0-9a-f]{32}((?:\.so)?)")
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
UID_MAP, OVERFLOW_UID = Path("/proc/self/uid_map"), Path("/proc/sys/kernel/overflowuid")
MAX_LINKS = 40
"""Largest number of symbolic links in a path, as in the kernel."""


class UntrustedError(PermissionError):
    """Another user could have written a file that would be executed."""

    def __init__(self, path: Path, reason: str):
        super().__init__(1, reason, str(path))


def private_folder(path: Path) -> Path:
    """Creates a folder that only this user can read and write, and its parents, which others may read; returns it.

    Raises:
        UntrustedError: Another user can change it or one of its parents.
        OSError: It cannot be created.
    """
    path = path.absolute()
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            _check_path(folder.parent)
            folder.mkdir(mode=0o700 if folder == path else 0o755, exist_ok=True)
    _check_path(path)
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise UntrustedError(path, "belongs to another user, who could put programs there")
    if status.st_mode & OTHERS_WRITE:
        raise UntrustedError(path, "can be written by others; delete it")
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


def signing_key(folder: Path) -> bytes:
    """Returns the key of the checksums of a private folder, and creates it on first use.

    Raises:
        OSError: It cannot be created, or another user could have written it.
    """
    path = folder / KEY_FILE
    if not path.exists():
        temporary = temporary_name(path)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(temporary, path)
        finally:
            temporary.unlink()
        sync(folder)
    key = read_private(path, secret=True)
    if len(key) != KEY_BYTES:
        raise UntrustedError(path, f"has {len(key)} bytes, must have {KEY_BYTES}; delete it")
    return key


def read_private(path: Path, secret: bool = False) -> bytes:
    """Reads a file that only this user can write and, if `secret`, only this user can read.

    Raises:
        UntrustedError: Another user has access, or it is not a file.
        OSError: It cannot be read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UntrustedError(path, "is not a file")
        if status.st_uid != os.geteuid():
            raise UntrustedError(path, "belongs to another user")
        if status.st_mode & (0o077 if secret else OTHERS_WRITE):
            raise UntrustedError(path, f"has mode {stat.S_IMODE(status.st_mode):04o}, so others can use it")
        return file.read()


def checksum(key: bytes, name: str, content: bytes) -> str:
    """Returns the keyed checksum of a file's name and content, as it appears in the name of the file on disk."""
    return hmac.digest(key, name.encode() + b"\0" + content, "sha256").hex()[:32]


def signed_name(key: bytes, name: str, content: bytes) -> str:
    """Adds the checksum to a name, before a `.so`. As part of the name, it cannot be separated from the file."""
    stem, suffix = (name.removesuffix(LIBRARY), LIBRARY) if name.endswith(LIBRARY) else (name, "")
    return f"{stem}.{checksum(key, name, content)}{suffix}"


def plain_name(path: Path) -> str:
    """Inverse of `signed_name`; empty if the name has no checksum."""
    parts = SIGNED.fullmatch(path.name)
    return "".join(parts.groups()) if parts else ""


def is_sound(key: bytes, path: Path) -> bool:
    """Whether a file matches the checksum in its name, and only this user can write it."""
    try:
        name = plain_name(path)
        return bool(name) and hmac.compare_digest(signed_name(key, name, read_private(path)), path.name)
    except OSError:
        return False


def signed_versions(folder: Path, name: str) -> list[Path]:
    """Lists the signed files of a folder with this plain name, damaged or not."""
    return sorted(path for path in folder.iterdir() if plain_name(path) == name)


def publish_signed(key: bytes, temporary: Path, name: str) -> Path:
    """Renames a complete file to its signed name in the same folder; returns the new path."""
    temporary.chmod(0o600)
    sync(temporary)
    path = temporary.with_name(signed_name(key, name, temporary.read_bytes()))
    publish(temporary, path)
    return path


def _check_path(path: Path) -> None:
    """Checks an existing folder, and every parent folder and symbolic link of its path."""
    current, names, links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    _check_folder(current)
    while names:
        name = names.pop()
        following = current.parent if name == ".." else current / name
        if following.is_symlink():
            links += 1
            if links > MAX_LINKS:
                raise UntrustedError(path, "has too many symbolic links")
            _check_owner(following, following.lstat().st_uid)
            target = Path(os.readlink(following))
            names += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            current = Path(target.anchor) if target.is_absolute() else current
        else:
            current = following
            _check_folder(current)


def _check_folder(folder: Path) -> None:
    status = folder.stat()
    _check_owner(folder, status.st_uid)
    others = status.st_mode & OTHERS_WRITE
    if others == stat.S_IWGRP and _is_own_group(status.st_gid) and not _has_access_list(folder):
        return
    if others and not status.st_mode & stat.S_ISVTX:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise UntrustedError(folder, f"can be written by others (mode {mode}; chmod go-w)")


def _check_owner(path: Path, uid: int) -> None:
    if uid not in (0, os.geteuid()) and not _is_outside(uid):
        raise UntrustedError(path, "belongs to another user, who could put programs there")


def _is_own_group(gid: int) -> bool:
    """Whether this is the private group that many systems create for each user, without other members."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return (gid, group.gr_name) == (user.pw_gid, user.pw_name) and set(group.gr_mem) <= {user.pw_name}


def _has_access_list(folder: Path) -> bool:
    try:
        return "system.posix_acl_access" in os.listxattr(folder)
    except (OSError, AttributeError):  # the file system, or the system, has no access lists
        return False


def _is_outside(uid: int) -> bool:
    """Whether this is the overflow id, which a container's user namespace shows for unmapped users of the host."""
    try:
        if UID_MAP.read_text().split() == ["0", "0", str(2**32 - 1)]:
            return False
        return uid == int(OVERFLOW_UID.read_text())
    except (OSError, ValueError):
        return False
