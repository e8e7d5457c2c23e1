"""Real storage servers for tests, benchmarks and the demonstration: what they need and how to ask for it.

Each module starts one kind of server and can stop, kill and restart it. Nothing here imports pytest but
`fixtures`, and nothing is simulated: what a machine lacks is a `BackendMissing`, which fixtures turn into
a skip.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

PACKAGES = (
    "ceph-common",
    "ceph-mon",
    "ceph-osd",
    "e2fsprogs",
    "fuse3",
    "glusterfs-server",
    "iproute2",
    "mount",
    "radosgw",
    "util-linux",
)
"""The Debian packages that all modules together need."""


class BackendMissing(Exception):  # noqa: N818 - what is missing is no fault of the program
    """This machine lacks something that a server needs. The message says what, and what to do."""


def install_command() -> str:
    """The one line that installs every Debian package that a server here needs."""
    return "apt-get update && apt-get install --yes --no-install-recommends " + " ".join(PACKAGES)


def require_command(command: str, package: str) -> str:
    """The path of `command`. Raises BackendMissing if `package` is not installed."""
    path = shutil.which(command, path=search_path())
    if path is None:
        raise BackendMissing(f"{package} is not installed; run: apt-get install {package}")
    return path


def search_path() -> str:
    """PATH with the folders of system commands: an ordinary user's has none of them."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"


def require_module(module: str, requirement: str) -> None:
    """Raises BackendMissing if the Python package with `module` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise BackendMissing(f"{module} is not installed; run: pip install '{requirement}'")


def require_root() -> None:
    """Raises BackendMissing unless this process may mount file systems and make network namespaces."""
    if os.geteuid() != 0:
        raise BackendMissing("mounts and network namespaces need root; run as root")


def require_fuse() -> None:
    """Raises BackendMissing if the kernel offers no FUSE."""
    if not Path("/dev/fuse").exists():
        raise BackendMissing("the kernel offers no FUSE: /dev/fuse is missing; load the module fuse")
