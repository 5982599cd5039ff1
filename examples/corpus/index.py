"""Finds a file in the package indexes and folders that pip is configured with.

In: a project's name, a file's name, `PipSettings`. Out: `Link`s to that file, the nearest first.
Both forms of the simple API are read, JSON (PEP 691) and HTML (PEP 503), over HTTP or `file:`;
`--find-links` entries may be folders, pages or archives. Source of the format:
https://packaging.python.org/en/latest/specifications/simple-repository-api/
"""

import base64
import html.parser
import http.client
import json
import netrc
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO

from examples.corpus.pip_settings import PipSettings, make_opener, split_credentials

_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.2"
_MAX_PAGE_BYTES = 1 << 28
_NUM_TRIES = 3
_RETRIED = {408, 429, 500, 502, 503, 504}


class UnreachableError(Exception):
    """An index or a file did not answer; the message says why, without credentials."""


@dataclass(frozen=True)
class Link:
    """Where a file lies.

    Attributes:
        url: Its address (`https:`, `http:` or `file:`), with credentials where the index has them.
        sha256: What the index says of its hash, or None.
    """

    url: str
    sha256: str | None


def open_url(
    url: str, settings: PipSettings, headers: Mapping[str, str] | None = None
) -> IO[bytes]:
    """Opens a URL as pip would; tries again where the failure may pass.

    Args:
        url: May carry credentials; otherwise the user's netrc is asked.
        settings: Certificates, proxy, time-out.
        headers: Sent with the request.

    Raises:
        UnreachableError: No answer, or one that is not the file.
        FileNotFoundError: The server says that there is no such page.
    """
    bare, user, password = split_credentials(url)
    parts = urllib.parse.urlsplit(bare)
    if user is None and parts.hostname and parts.scheme != "file":
        user, password = _netrc_entry(parts.hostname)
    request = urllib.request.Request(bare, headers=dict(headers or {}))
    if user is not None:
        token = base64.b64encode(f"{user}:{password or ''}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    opener = make_opener(settings, parts.netloc)
    reason = ""
    for attempt in range(_NUM_TRIES):
        if attempt:
            time.sleep(attempt)
        try:
            answer: IO[bytes] = opener.open(request, timeout=settings.timeout)
            return answer
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
                raise FileNotFoundError(bare) from error
            reason = f"HTTP {error.code} {error.reason}"
            if error.code not in _RETRIED:
                break
        except urllib.error.URLError as error:
            if isinstance(error.reason, FileNotFoundError):
                raise FileNotFoundError(bare) from error
            reason = str(error.reason)
            if isinstance(error.reason, ConnectionRefusedError):
                break
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
    raise UnreachableError(f"{parts.hostname or bare}: {reason}")


def _netrc_entry(host: str) -> tuple[str | None, str | None]:
    try:
        entry = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None, None
    return (entry[0], entry[2]) if entry else (None, None)


def find_links(project: str, file_name: str, settings: PipSettings) -> tuple[list[Link], list[str]]:
    """Looks for a file in every place that pip would look in.

    Args:
        project: Normalised name of the package.
        file_name: The wheel or source archive.
        settings: From `read_pip_settings`.

    Returns:
        The links, local ones first, and why places could not be read.
    """
    links: list[Link] = []
    problems: list[str] = []
    places = [(entry, False) for entry in settings.find_links]
    places += [(f"{url.rstrip('/')}/{project}/", True) for url in settings.index_urls]
    for place, is_index in places:
        try:
            found = _links_of_index(place, settings) if is_index else _links_of(place, settings)
            links += [link for name, link in found if name == file_name]
        except FileNotFoundError:
            continue
        except (UnreachableError, OSError, ValueError) as error:
            problems.append(" ".join(str(error).split()))
    links.sort(key=lambda link: not link.url.startswith("file:"))
    return links, problems


def _links_of(entry: str, settings: PipSettings) -> Iterator[tuple[str, Link]]:
    """Yields the files of one `--find-links` entry: a folder, an archive, or a page of links."""
    path = _local_path(entry)
    if path is None:
        yield from _links_of_page(entry, settings)
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            yield child.name, Link(child.resolve().as_uri(), None)
    elif path.suffix in (".html", ".htm"):
        yield from _links_of_page(path.resolve().as_uri(), settings)
    elif path.is_file():
        yield path.name, Link(path.resolve().as_uri(), None)


def _links_of_index(url: str, settings: PipSettings) -> Iterator[tuple[str, Link]]:
    """Yields the files on a project's page; an index given as a folder has `index.html` in it."""
    path = _local_path(url)
    if path is None:
        yield from _links_of_page(url, settings)
    elif (path / "index.html").is_file():
        yield from _links_of_page((path / "index.html").resolve().as_uri(), settings)
    elif path.is_dir():
        yield from _links_of(str(path), settings)


def _local_path(place: str) -> Path | None:
    parts = urllib.parse.urlsplit(place)
    if parts.scheme == "file":
        return Path(urllib.request.url2pathname(parts.path))
    return Path(place).expanduser() if parts.scheme not in ("http", "https") else None


def _links_of_page(url: str, settings: PipSettings) -> Iterator[tuple[str, Link]]:
    with open_url(url, settings, {"Accept": _ACCEPT}) as answer:
        body = answer.read(_MAX_PAGE_BYTES)
        final_url = getattr(answer, "url", url)
        content_type = dict(getattr(answer, "headers", {})).get("Content-Type", "")
    _, user, password = split_credentials(url)
    if "json" in content_type or body[:1] == b"{":
        entries = _json_entries(body)
    else:
        entries = _html_entries(body.decode("utf-8", "replace"))
    for reference, sha256 in entries:
        target, fragment = urllib.parse.urldefrag(urllib.parse.urljoin(final_url, reference))
        declared = sha256 or urllib.parse.parse_qs(fragment).get("sha256", [None])[0]
        name = urllib.parse.unquote(urllib.parse.urlsplit(target).path.rpartition("/")[2])
        yield name, Link(_with_credentials(target, url, user, password), declared)


def _json_entries(body: bytes) -> Iterator[tuple[str, str | None]]:
    for entry in json.loads(body)["files"]:
        yield entry["url"], entry.get("hashes", {}).get("sha256")


def _html_entries(text: str) -> Iterator[tuple[str, str | None]]:
    parser = _Anchors()
    parser.feed(text)
    for reference in parser.references:
        yield urllib.parse.urljoin(parser.base, reference) if parser.base else reference, None


class _Anchors(html.parser.HTMLParser):
    """Collects the targets of a page's anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        reference = dict(attrs).get("href")
        if reference and tag == "a":
            self.references.append(reference)
        elif reference and tag == "base" and not self.base:
            self.base = reference


def _with_credentials(target: str, index: str, user: str | None, password: str | None) -> str:
    """Passes an index's credentials on to files of the same host, as pip does."""
    parts = urllib.parse.urlsplit(target)
    bare_index, _, _ = split_credentials(index)
    if user is None or parts.netloc != urllib.parse.urlsplit(bare_index).netloc:
        return target
    credentials = urllib.parse.quote(user, safe="")
    if password:
        credentials += ":" + urllib.parse.quote(password, safe="")
    return urllib.parse.urlunsplit(parts._replace(netloc=f"{credentials}@{parts.netloc}"))
