"""Files of this user that are executed, such as compiled programs and libraries: where they may lie, and a keyed
checksum of each.

A folder is private if it belongs to this user, nobody else may write to it, and no other user can exchange it: each
folder on the way to it belongs to this user or to root and is writable by its owner alone. (A sticky folder such as
/tmp will do: others cannot rename what is in it.) The key of the checksums is a file of the same folder, so that
a file that was put there from elsewhere, or damaged, does not have the checksum that its name states.
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
MOST_LINKS = 40
"""Symbolic links that are followed on the way to a folder, as in the kernel."""


class UntrustedError(PermissionError):
    """Another user could have written what would be executed."""

    def __init__(self, path: Path, reason: str):
        super().__init__(1, reason, str(path))


def private_folder(path: Path) -> Path:
    """Makes a folder that only this user can read and write, and those above it, which others may read; returns it.

    Raises:
        UntrustedError: It, or a folder on the way to it, can be changed by another user.
        OSError: It cannot be made.
    """
    path = path.absolute()
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            _check_way(folder.parent)
            folder.mkdir(mode=0o700 if folder == path else 0o755, exist_ok=True)
    _check_way(path)
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise UntrustedError(path, "belongs to another user, who could put programs there")
    if status.st_mode & OTHERS_WRITE:
        raise UntrustedError(path, "can be written by others; delete it")
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


def signing_key(folder: Path) -> bytes:
    """The key of the checksums of a private folder; it is made when it is first asked for.

    Raises:
        OSError: It cannot be made, or another user could have written it.
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
    """The content of a file that only this user can write; a `secret` one nobody else may read either.

    Raises:
        UntrustedError: Another user can, or it is not a file.
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
    """The keyed checksum of a file that has this name, as it stands in the name of the file on the disk."""
    return hmac.digest(key, name.encode() + b"\0" + content, "sha256").hex()[:32]


def signed_name(key: bytes, name: str, content: bytes) -> str:
    """`name` with its checksum, before a `.so`: one name, so that file and checksum cannot come apart."""
    stem, suffix = (name.removesuffix(LIBRARY), LIBRARY) if name.endswith(LIBRARY) else (name, "")
    return f"{stem}.{checksum(key, name, content)}{suffix}"


def plain_name(path: Path) -> str:
    """What `signed_name` made a name of; empty, if it did not make it."""
    parts = SIGNED.fullmatch(path.name)
    return "".join(parts.groups()) if parts else ""


def is_sound(key: bytes, path: Path) -> bool:
    """Whether a file is what its name, made by `signed_name`, says, and only this user can write it."""
    try:
        name = plain_name(path)
        return bool(name) and hmac.compare_digest(signed_name(key, name, read_private(path)), path.name)
    except OSError:
        return False


def signed_versions(folder: Path, name: str) -> list[Path]:
    """The files of a folder that `signed_name` named so, sound or not."""
    return sorted(path for path in folder.iterdir() if plain_name(path) == name)


def publish_signed(key: bytes, temporary: Path, name: str) -> Path:
    """Gives a complete file its signed name in the same folder, and returns that."""
    temporary.chmod(0o600)
    sync(temporary)
    path = temporary.with_name(signed_name(key, name, temporary.read_bytes()))
    publish(temporary, path)
    return path


def _check_way(path: Path) -> None:
    """Checks every folder and symbolic link on the way to an existing folder, and the folder."""
    current, names, links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    _check_folder(current)
    while names:
        name = names.pop()
        following = current.parent if name == ".." else current / name
        if following.is_symlink():
            links += 1
            if links > MOST_LINKS:
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
    """Whether this is the group that many systems make for each user, with nobody else in it."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return (gid, group.gr_name) == (user.pw_gid, user.pw_name) and set(group.gr_mem) <= {user.pw_name}


def _has_access_list(folder: Path) -> bool:
    try:
        return "system.posix_acl_access" in os.listxattr(folder)
    except (OSError, AttributeError):  # a file system, or a system, without such lists
        return False


def _is_outside(uid: int) -> bool:
    """Whether this id stands for those of the host that a container's user namespace does not know, as root's."""
    try:
        if UID_MAP.read_text().split() == ["0", "0", str(2**32 - 1)]:
            return False
        return uid == int(OVERFLOW_UID.read_text())
    except (OSError, ValueError):
        return False
