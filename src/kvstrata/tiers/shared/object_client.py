"""ObjectClient: an object store's verbs over the package obstore, with the system's errors and with bounds.

The only file that knows obstore. Every call blocks; it ends within a few times `request_seconds`, but for a
local folder, which answers when its file system does. It knows nothing of extents or members.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from kvstrata.config import ObjectStoreTierConfig, object_url_fault
from kvstrata.errors import ConfigError

try:
    import obstore
    from obstore import exceptions
    from obstore.store import LocalStore, from_url
except ImportError as missing:
    raise ConfigError(
        "the object_store tier needs the package obstore, which is not installed: "
        "pip install 'kvstrata[object-store]'"
    ) from missing

BACKOFF_SECONDS = 0.1
"""The client waits for at least so long before it asks again."""
MESSAGE_LIMIT = 300
PANIC = "PanicException"
"""What a bug in obstore raises. It is no Exception, and would end a thread."""
CLIENT_OPTIONS = {
    "allow_http", "allow_invalid_certificates", "connect_timeout", "http1_only",
    "http2_keep_alive_interval", "http2_keep_alive_timeout", "http2_keep_alive_while_idle", "http2_only",
    "pool_idle_timeout",
    "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes", "proxy_url", "randomize_addresses",
    "read_timeout", "root_certificate", "timeout", "user_agent",
}  # fmt: skip
"""Options of the connection; every other name is one of the store."""

_CODE = re.compile(r"Os \{\s*code: (\d+)")
_STATUS = re.compile(r"status(?: code)?: (\d{3})")
_STATUS_ERRNO = {
    401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 408: errno.ETIMEDOUT, 409: errno.EBUSY,
    412: errno.EEXIST, 416: errno.ERANGE, 429: errno.EAGAIN, 503: errno.EAGAIN, 504: errno.ETIMEDOUT,
    507: errno.ENOSPC,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Listed:
    """Objects (name -> bytes) and folders (last parts of their names) directly below one."""

    objects: dict[str, int]
    folders: list[str]


class ObjectClient:
    """store: of obstore. part_bytes, parts_in_flight: how larger objects are uploaded.

    Calls raise OSError; `None` and False say that something is not there.
    """

    def __init__(self, store: Any, *, part_bytes: int = 8 * 2**20, parts_in_flight: int = 8) -> None:
        self._store = store
        self._part_bytes = part_bytes
        self._parts_in_flight = parts_in_flight

    @property
    def local(self) -> Path | None:
        """The folder, for a store that is one."""
        if isinstance(self._store, LocalStore) and self._store.prefix is not None:
            return Path(self._store.prefix)
        return None

    # One object

    def put(self, name: str, data: bytes) -> None:
        """Small: by one request. Old or new content for every reader."""
        with _system_errors(name):
            obstore.put(self._store, name, data, use_multipart=False)

    def put_new(self, name: str, data: bytes) -> bool | None:
        """False if there is one already; None if this store cannot tell."""
        with _system_errors(name):
            try:
                obstore.put(self._store, name, data, mode="create")
            except exceptions.AlreadyExistsError:
                return False
            except exceptions.PreconditionError:
                return False
            except (exceptions.NotSupportedError, NotImplementedError):
                return None
        return True

    def upload(self, name: str, data: Any) -> None:
        """A large buffer: in parts, several in flight, visible when all of them are there."""
        with _system_errors(name):
            obstore.put(
                self._store,
                name,
                data,
                use_multipart=True,
                chunk_size=self._part_bytes,
                max_concurrency=self._parts_in_flight,
            )

    def get(self, name: str) -> bytes | None:
        with _system_errors(name):
            try:
                return bytes(memoryview(obstore.get(self._store, name).bytes()))
            except FileNotFoundError:
                return None

    def get_range(self, name: str, start: int, size: int) -> memoryview | None:
        """Fewer bytes at the end, none behind it."""
        try:
            with _system_errors(name):
                return memoryview(obstore.get_range(self._store, name, start=start, length=size))
        except OSError as error:
            if error.errno == errno.ERANGE:
                return memoryview(b"")
            if error.errno == errno.ENOENT:
                return None
            raise

    def size(self, name: str) -> int | None:
        with _system_errors(name):
            try:
                return int(obstore.head(self._store, name)["size"])
            except FileNotFoundError:
                return None

    def delete(self, names: Iterable[str]) -> None:
        """Those that are not there are no error."""
        for name in names:
            with _system_errors(name), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, name)

    # Many

    def listed(self, folder: str) -> Listed:
        """What lies directly in a folder; empty if there is no such folder."""
        with _system_errors(folder):
            try:
                found = obstore.list_with_delimiter(self._store, folder)
            except FileNotFoundError:
                return Listed({}, [])
        return Listed(
            {one["path"]: one["size"] for one in found["objects"]},
            sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]),
        )

    def below(self, folder: str) -> dict[str, int]:
        """name -> bytes of every object in a folder and in the folders in it."""
        with _system_errors(folder):
            try:
                return {
                    one["path"]: one["size"] for page in obstore.list(self._store, folder) for one in page
                }
            except FileNotFoundError:  # a folder of a file system that was removed meanwhile
                return {}


def open_client(config: ObjectStoreTierConfig) -> ObjectClient:
    """The client that a [[tier]] table describes; nothing is asked of the store yet. Raises ConfigError."""
    fault = object_url_fault(config.url)
    if fault:
        raise ConfigError(f"object_store url {shown_url(config.url)!r}: {fault}")
    options = dict(config.options)
    endpoint = next((value for name, value in options.items() if "endpoint" in name.lower()), "")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))
    request = timedelta(seconds=config.request_seconds)
    connection: dict[str, Any] = {
        "timeout": request,
        "connect_timeout": min(request, timedelta(seconds=5)),
        "allow_http": endpoint.startswith("http://"),  # asked for by name: no further switch
    }
    for name in CLIENT_OPTIONS & options.keys():
        value = options.pop(name)
        connection[name] = {"true": True, "false": False}.get(value, value)
    backoff = timedelta(seconds=BACKOFF_SECONDS)
    try:
        if config.url.startswith("file:"):
            store: Any = LocalStore.from_url(config.url, mkdir=True, automatic_cleanup=True)
        else:
            store = from_url(
                config.url,
                config=options,
                client_options=connection,
                retry_config={
                    "max_retries": config.retries,
                    "retry_timeout": request,
                    "backoff": {"init_backoff": backoff, "max_backoff": timedelta(seconds=1), "base": 2},
                },
            )
    except (exceptions.BaseError, ValueError, OSError) as error:
        raise ConfigError(f"object_store {shown_url(config.url)}: {_short(error)}") from None
    return ObjectClient(store, part_bytes=config.part_bytes, parts_in_flight=config.parts_in_flight)


def shown_url(url: str) -> str:
    """For people: without a password or a query, which may be a key."""
    bare = url.partition("?")[0]
    scheme, separator, rest = bare.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


@contextlib.contextmanager
def _system_errors(name: str) -> Iterator[None]:
    try:
        yield
    except exceptions.BaseError as error:
        raise OSError(_number(error), _short(error), name) from None
    except OSError as error:
        if error.errno is not None:
            raise
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else _number(error)
        raise OSError(number, _short(error), name) from None
    except (ValueError, TypeError, NotImplementedError) as error:
        raise OSError(errno.EINVAL, _short(error), name) from None
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise OSError(errno.EIO, f"obstore failed: {error}", name) from None


def _number(error: Exception) -> int:
    """The errno that fits best."""
    kinds: list[tuple[type[Exception], int]] = [
        (exceptions.PermissionDeniedError, errno.EACCES),
        (exceptions.UnauthenticatedError, errno.EACCES),
        (exceptions.AlreadyExistsError, errno.EEXIST),
        (exceptions.PreconditionError, errno.EEXIST),
        (exceptions.NotSupportedError, errno.ENOTSUP),
        (exceptions.InvalidPathError, errno.EINVAL),
    ]
    for kind, number in kinds:
        if isinstance(error, kind):
            return number
    text = str(error)
    if "TimedOut" in text or "timed out" in text:
        return errno.ETIMEDOUT
    if "InvalidRange" in text:
        return errno.ERANGE
    if code := _CODE.search(text):
        return int(code[1])
    if status := _STATUS.search(text):
        return _STATUS_ERRNO.get(int(status[1]), errno.EIO)
    return errno.EIO


def _short(error: Exception) -> str:
    """Its first line, without the query of a request, which may be a signature."""
    first = str(error).partition("\n")[0]
    return re.sub(r"\?\S*", "?...", first)[:MESSAGE_LIMIT]
