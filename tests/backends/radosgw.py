"""A real S3 server: Ceph's radosgw over a small cluster that keeps its data in memory.

Killing and starting the gateway loses nothing, as the cluster goes on: a monitor and an object server. It
has no manager: S3 needs none, and it would be the heaviest of all.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import json
import signal
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.error import URLError
from urllib.parse import urlsplit

from backends import require_command
from backends.netns import Network, command_in
from backends.workplace import Workplace

REGION = "default"
BUCKET = "kvstrata"
PORT = 7480
MEMORY_BYTES = 4 << 30
"""What the object server may hold."""
CLUSTER = "6c6b2c5c-7c0b-4f1e-9a39-0d5f3a1b7e11"
OBJECT_SERVER = "6c6b2c5c-7c0b-4f1e-9a39-0d5f3a1b7e12"
GATEWAY = "client.gateway"
ALL_CAPS = [word for kind in ("mon", "osd", "mgr") for word in ("--cap", kind, "allow *")]

# Without tcp_nodelay a small answer takes 40 ms. With the default of 30 s for watches, a gateway that was
# killed waits that long for its dead self when it makes its first bucket.
# By default the monitor waits a second before each change of its map, and a gateway's start makes many.
CONFIG = """\
[global]
fsid = {cluster}
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
crash dir = {folder}/crash
keyring = {folder}/keyring
mon host = {address}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
paxos propose interval = 0.02
paxos min wait = 0.01
mon allow pool size one = true
mon data avail crit = 1
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd data = {folder}/osd0
mon data = {folder}/mon.a
rgw frontends = beast port={port} tcp_nodelay=1
osd client watch timeout = 3
"""


@dataclass(frozen=True)
class S3Account:
    """Where the bucket is, and who may use it."""

    endpoint: str
    bucket: str
    region: str
    access_key: str
    secret_key: str

    def options(self) -> dict[str, object]:
        """For `obstore.store.S3Store`."""
        return {
            "bucket": self.bucket,
            "endpoint": self.endpoint,
            "region": self.region,
            "access_key_id": self.access_key,
            "secret_access_key": self.secret_key,
            "virtual_hosted_style_request": False,
            "client_options": {"allow_http": True},
        }


class RadosGateway:
    """A running cluster and its gateway. The host reaches it over a link of its own, limited if asked."""

    def __init__(self, place: Workplace, bytes_per_second: int | None = None) -> None:
        """Raises BackendMissing without the packages."""
        self._commands = {
            command: require_command(command, package)
            for command, package in (
                ("ceph", "ceph-common"),
                ("ceph-authtool", "ceph-common"),
                ("ceph-mon", "ceph-mon"),
                ("ceph-osd", "ceph-osd"),
                ("monmaptool", "ceph-common"),
                ("radosgw", "radosgw"),
                ("radosgw-admin", "radosgw"),
            )
        }
        self.place = place
        self.network = Network(place)
        self.network.join_host(bytes_per_second)
        self._conf = place.folder / "ceph.conf"
        self._start_cluster()
        self.start()
        user = self._run("radosgw-admin", "user", "create", "--uid=kvstrata", "--display-name=kvstrata")
        keys = json.loads(user)["keys"][0]
        endpoint = f"http://{self.network.address}:{PORT}"
        self.account = S3Account(endpoint, BUCKET, REGION, keys["access_key"], keys["secret_key"])
        self.make_bucket(BUCKET)

    def start(self) -> None:
        """The gateway, again after `kill`."""
        self._spawn("gateway", "radosgw", "-f", "-n", GATEWAY)
        self.place.await_true("radosgw answers", self._answers, "gateway")

    def kill(self) -> None:
        """kill -9 of the gateway: connections are refused until `start`."""
        self.place.kill("gateway")

    def freeze(self) -> None:
        """SIGSTOP of the gateway: it accepts connections and answers nothing until `thaw`."""
        self.place.signal("gateway", signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        self.place.signal("gateway", signal.SIGCONT)

    def limit(self, bytes_per_second: int | None) -> None:
        """Of the link between host and server, each way; None lifts it."""
        self.network.limit("host", bytes_per_second)

    def cut(self) -> None:
        """Requests get no answer until `mend`."""
        self.network.cut("host")

    def mend(self) -> None:
        """Undo `cut`."""
        self.network.mend("host")

    def make_bucket(self, name: str) -> None:
        """An empty bucket; harmless if there is one."""
        request = urllib.request.Request(f"{self.account.endpoint}/{name}", method="PUT")
        _sign(request, self.account)
        with urllib.request.urlopen(request, timeout=60):
            pass

    def _start_cluster(self) -> None:
        folder, address = self.place.folder, self.network.address
        self._conf.write_text(
            CONFIG.format(
                cluster=CLUSTER, folder=folder, address=address, memory_bytes=MEMORY_BYTES, port=PORT
            )
        )
        for name in ("mon.a", "osd0", "crash"):
            (folder / name).mkdir()
        keyring, monmap = str(folder / "keyring"), str(folder / "monmap")
        for name in ("mon.", "client.admin", "osd.0", GATEWAY):
            create = [] if (folder / "keyring").exists() else ["--create-keyring"]
            self._run("ceph-authtool", *create, keyring, "--gen-key", "-n", name, *ALL_CAPS)
        ports = f"[v2:{address}:3300,v1:{address}:6789]"
        self._run("monmaptool", "--create", "--addv", "a", ports, "--fsid", CLUSTER, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._spawn("mon", "ceph-mon", "-f", "-i", "a")
        self._run("ceph", "osd", "new", OBJECT_SERVER)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", OBJECT_SERVER)
        self._spawn("osd", "ceph-osd", "-f", "-i", "0")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.network.address}:{PORT}/", timeout=5):
                return True
        except (URLError, OSError):
            return False

    def _run(self, command: str, *words: str) -> str:
        line = [self._commands[command], "-c", str(self._conf), *words]
        return self.place.run(command_in(self.network.server, line))

    def _spawn(self, role: str, command: str, *words: str) -> None:
        line = [self._commands[command], "-c", str(self._conf), *words]
        self.place.spawn(command_in(self.network.server, line), role)


@contextlib.contextmanager
def rados_gateway(bytes_per_second: int | None = None) -> Iterator[RadosGateway]:
    """A running S3 server with an empty bucket. Raises BackendMissing where it cannot run."""
    with Workplace("radosgw") as place:
        yield RadosGateway(place, bytes_per_second)


def _sign(request: urllib.request.Request, account: S3Account) -> None:
    """AWS Signature Version 4 of a request without body and query, as Amazon's S3 reference has it."""
    parts = urlsplit(request.full_url)
    now = datetime.datetime.now(datetime.UTC)
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    empty = hashlib.sha256(b"").hexdigest()
    headers = {"host": parts.netloc, "x-amz-content-sha256": empty, "x-amz-date": stamp}
    names = ";".join(headers)
    lines = [
        request.get_method(),
        parts.path,
        "",
        *(f"{k}:{v}" for k, v in headers.items()),
        "",
        names,
        empty,
    ]
    scope = f"{day}/{account.region}/s3/aws4_request"
    hashed = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = f"AWS4{account.secret_key}".encode()
    for word in (day, account.region, "s3", "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashed))
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    credential = f"AWS4-HMAC-SHA256 Credential={account.access_key}/{scope}"
    request.add_header("Authorization", f"{credential}, SignedHeaders={names}, Signature={signature}")
    for name, value in headers.items():
        request.add_header(name, value)
