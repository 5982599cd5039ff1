"""Made-up packages, and an index that serves them on the loopback address."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from examples.corpus.pins import Pin

INCOMPRESSIBLE = "\n".join(hashlib.sha256(bytes([i])).hexdigest() for i in range(200))


def _write_archive(path: Path, members: Mapping[str, str | bytes]) -> Path:
    """Writes a wheel, or a source archive with its one top folder, with the members given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        name: text.encode() if isinstance(text, str) else text for name, text in members.items()
    }
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path, "w:gz") as archive:
            for name, content in contents.items():
                info = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def _pin_of(path: Path, package: str, yields: tuple[str, ...] = ("english",)) -> Pin:
    """Pins an archive as it lies there."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Pin(package, "1.0", path.name, len(content), digest, "MIT", yields)


@pytest.fixture
def write_archive() -> Callable[[Path, Mapping[str, str | bytes]], Path]:
    return _write_archive


@pytest.fixture
def pin_of() -> Callable[..., Pin]:
    return _pin_of


@dataclass
class Index:
    """A simple-API index in this process.

    Attributes:
        url: Of the index.
        files: Content by project and file name.
        says_json: Answers with JSON instead of HTML.
        declares_hashes: Says the hash of every file.
        credentials: What requests must carry, or None.
        requests: (path, Range header) of every file request.
        cut_after: Breaks the next answer for a file off after so many bytes.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    says_json: bool = False
    declares_hashes: bool = True
    credentials: str | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    cut_after: dict[str, int] = field(default_factory=dict)


def _handler(index: Index) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if index.credentials and self.headers["Authorization"] != index.credentials:
                self._answer(401, b"", "text/plain")
                return
            parts = self.path.strip("/").split("/")
            if parts[0] == "simple" and len(parts) == 2 and parts[1] in index.files:
                self._answer_page(parts[1])
            elif parts[0] == "files" and parts[-1] in index.files.get(parts[1], {}):
                self._answer_file(index.files[parts[1]][parts[-1]])
            else:
                self._answer(404, b"", "text/plain")

        def _answer_page(self, project: str) -> None:
            entries = []
            for name, content in index.files[project].items():
                digest = hashlib.sha256(content).hexdigest() if index.declares_hashes else None
                entries.append((name, f"../../files/{project}/{name}", digest))
            if index.says_json:
                files = [
                    {"filename": name, "url": url, "hashes": {"sha256": digest} if digest else {}}
                    for name, url, digest in entries
                ]
                body = json.dumps({"files": files}).encode()
                self._answer(200, body, "application/vnd.pypi.simple.v1+json")
            else:
                anchors = (
                    f'<a href="{url}{f"#sha256={digest}" if digest else ""}">{name}</a>'
                    for name, url, digest in entries
                )
                self._answer(200, "\n".join(anchors).encode(), "text/html")

        def _answer_file(self, content: bytes) -> None:
            wanted = self.headers["Range"]
            index.requests.append((self.path, wanted))
            status = 200
            if wanted:
                content = content[int(wanted.removeprefix("bytes=").removesuffix("-")) :]
                status = 206
            cut = index.cut_after.pop(self.path.rpartition("/")[2], None)
            self._answer(status, content, "application/octet-stream", cut)

        def _answer(self, status: int, body: bytes, kind: str, cut: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


@pytest.fixture
def index() -> Iterator[Index]:
    served = Index()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    served.url = f"http://127.0.0.1:{server.server_port}/simple"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def publish(index: Index, tmp_path: Path) -> Callable[..., Pin]:
    """Puts a made-up wheel on the index and returns its pin."""

    def publish_wheel(package: str = "prose", text: str = INCOMPRESSIBLE) -> Pin:
        name = f"{package.replace('-', '_')}-1.0-py3-none-any.whl"
        path = _write_archive(tmp_path / "upstream" / name, {f"{package}/text.txt": text})
        index.files[package] = {name: path.read_bytes()}
        return _pin_of(path, package)

    return publish_wheel
