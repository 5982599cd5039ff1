"""A real S3 server (moto) on the loopback, behind a TCP proxy that cuts connections on demand."""

import contextlib
import logging
import os
import select
import socket
import struct
import threading
from collections import deque
from typing import Any

SECRET = "never-to-be-printed"
_RESET = struct.pack("ii", 1, 0)  # close with a reset instead of an orderly end


class FaultyProxy:
    """Forwards TCP connections to a server and cuts some of them.

    Attributes:
        cuts: For each of the next connections, the number of bytes (in both directions together)
            after which it is cut; None forwards all. Connections after the last are forwarded.
        is_down: Whether every connection is cut at once.
        num_bytes: Bytes forwarded so far.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self.cuts: deque[int | None] = deque()
        self.is_down = False
        self.num_bytes = 0
        self.num_cut = 0
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_all(self) -> None:
        """Cuts the open connections."""
        for one in list(self._open):
            self._cut(one)

    def fail_next(self, *cuts: int | None) -> None:
        """Cuts the open connections, and the next ones after some bytes; see `cuts`."""
        self.cut_all()
        self.num_cut = 0
        self.cuts.extend(cuts)

    def go_down(self) -> None:
        """Cuts the open connections and all new ones."""
        self.is_down = True
        self.cut_all()

    def close(self) -> None:
        self._listener.close()
        self.cut_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_down:
                self._cut(client)
                continue
            budget = self.cuts.popleft() if self.cuts else None
            threading.Thread(target=self._forward, args=(client, budget), daemon=True).start()

    def _forward(self, client: socket.socket, budget: int | None) -> None:
        server = socket.create_connection(self._server)
        self._open |= {client, server}
        other = {client: server, server: client}
        try:
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    if budget is not None and len(data) > budget:
                        self._cut(client)
                        return
                    budget = None if budget is None else budget - len(data)
                    other[source].sendall(data)
                    self.num_bytes += len(data)
        except (OSError, ValueError):  # ValueError: closed by `cut_all`
            return
        finally:
            for one in (client, server):
                self._open.discard(one)
                one.close()

    def _cut(self, one: socket.socket) -> None:
        self.num_cut += 1
        with contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            one.close()


class ObjectStore:
    """The server, its proxy, and direct access to the objects for tests."""

    bucket = "corpora"

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        host, self.port = self._moto.get_host_and_port()
        self.proxy = FaultyProxy((host, self.port))
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # this project's own attempts are tested
        }

    def reset(self) -> None:
        """Removes all objects, creates the bucket anew and forwards everything again."""
        import requests

        self.proxy.cuts.clear()
        self.proxy.is_down = False
        self.proxy.num_cut = 0
        requests.post(f"http://127.0.0.1:{self.port}/moto-api/reset", timeout=10)
        self.client().create_bucket(Bucket=self.bucket)

    def client(self) -> Any:
        """Returns a boto client that does not pass the proxy."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id="test",
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def put(self, name: str, content: bytes) -> str:
        """Writes an object and returns its URL."""
        self.client().put_object(Bucket=self.bucket, Key=name, Body=content)
        return f"s3://{self.bucket}/{name}"

    def get(self, name: str) -> bytes:
        content: bytes = self.client().get_object(Bucket=self.bucket, Key=name)["Body"].read()
        return content

    def names(self) -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", ()))

    def num_unfinished_uploads(self) -> int:
        listing = self.client().list_multipart_uploads(Bucket=self.bucket)
        return len(listing.get("Uploads", ()))

    def close(self) -> None:
        self.proxy.close()
        self._moto.stop()
