"""One rule for every path that a user gives: it is local, and `~` means a home folder."""

import os
import re

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.\-]+):/")


def local_path(path: str, key: str) -> str:
    """Expand `~` and `~user`, and refuse what names no place on this machine.

    Args:
        path: of a file or folder, a glob, or a name that is no path.
        key: what it was given as, for messages.

    Returns:
        The path.

    Raises:
        ValueError: It is empty, or begins with a scheme (`s3://`, or what is left of one, `s3:/`) or an unknown user.
    """
    if not path.strip():
        raise ValueError(f"{key}={path!r} names nothing: give a path, or leave {key} out")
    if scheme := _SCHEME.match(path):
        raise ValueError(
            f"{key}={path!r}: {scheme[1]}:// is no local path, and stores are not supported: mount it, or copy it here "
            f"(a folder of this name is ./{path.strip()})"
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        raise ValueError(f"{key}={path!r}: there is no such user, or no home folder (a file of this name is ./{path})")
    return expanded
