"""Where this machine gets its packages from, as pip is configured.

In: pip's own answer (`pip config list`, and `pip download --help` for its default index), which
covers pip's files, its environment variables and the command sections. Out: `PipSettings`, and
`make_opener` for urllib with pip's certificates and proxy. The package itself names no index:
whatever pip would ask is asked.
"""

import ast
import importlib.util
import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_chatflow.errors import UserError

_SECTIONS = ("global", "install", "download", ":env:")  # later ones win, as in pip


@dataclass(frozen=True)
class PipSettings:
    """What pip would use to find and fetch a file.

    Attributes:
        index_urls: Simple-API indexes, the main one first.
        find_links: Folders, pages or archives that are looked through besides.
        cert: Certificate bundle or None for the system's.
        client_cert: Client certificate or None.
        proxy: Proxy for all requests or None for the environment's.
        trusted_hosts: Hosts (`name` or `name:port`) whose certificates are not checked.
        timeout: Seconds without an answer before a request is given up.
    """

    index_urls: tuple[str, ...]
    find_links: tuple[str, ...] = ()
    cert: str | None = None
    client_cert: str | None = None
    proxy: str | None = None
    trusted_hosts: frozenset[str] = frozenset()
    timeout: float = 15.0


def read_pip_settings() -> PipSettings:
    """Asks the environment's pip for its settings.

    Raises:
        UserError: There is no pip, or it does not tell its index.
    """
    values = parse_config(_run_pip("config", "list"))
    index_urls: list[str] = []
    if values.get("no-index", "false").lower() not in ("1", "true", "yes", "on"):
        main = values.get("index-url") or values.get("pypi-url") or _default_index()
        index_urls = [main, *values.get("extra-index-url", "").split()]
    try:
        timeout = float(values.get("timeout") or values.get("default-timeout") or 15)
    except ValueError:
        timeout = 15.0
    return PipSettings(
        index_urls=tuple(dict.fromkeys(index_urls)),
        find_links=tuple(dict.fromkeys(values.get("find-links", "").split())),
        cert=values.get("cert"),
        client_cert=values.get("client-cert"),
        proxy=values.get("proxy"),
        trusted_hosts=frozenset(values.get("trusted-host", "").split()),
        timeout=timeout,
    )


def parse_config(listing: str) -> dict[str, str]:
    """Merges the lines of `pip config list` by pip's precedence.

    Args:
        listing: Lines `section.key='value'`; an environment variable's section is `:env:`.

    Returns:
        The value in force for every key.
    """
    found: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        name, separator, literal = line.partition("=")
        section, dot, key = name.strip().partition(".")
        if not separator or not dot or section not in _SECTIONS:
            continue
        try:
            value = str(ast.literal_eval(literal.strip()))
        except (SyntaxError, ValueError):
            continue
        rank = _SECTIONS.index(section)
        if rank >= found.get(key, (-1, ""))[0]:
            found[key] = (rank, value)
    return {key: value for key, (_, value) in found.items()}


def _default_index() -> str:
    text = _run_pip("download", "--help", columns=1000)
    match = re.search(r"--index-url <url>.*?\(default:? (\S+?)\)", text, re.DOTALL)
    if match is None:
        raise UserError(
            "pip does not tell which index it uses: set PIP_INDEX_URL, or give a folder with the "
            "files: --archive-dir DIR"
        )
    return match.group(1)


def _run_pip(*arguments: str, columns: int = 200) -> str:
    """Returns what pip prints; this environment's pip, or else the first on the path."""
    commands = [[sys.executable, "-m", "pip"]]
    if on_path := shutil.which("pip"):
        commands.append([on_path])
    for command in commands:
        answer = subprocess.run(
            [*command, "--no-input", "--disable-pip-version-check", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": str(columns), "PYTHONWARNINGS": "ignore"},
            check=False,
        )
        if answer.returncode == 0:
            return answer.stdout
    raise UserError(
        f"pip: `pip {arguments[0]}` does not run in this environment: install pip, or give a "
        "folder with the files: --archive-dir DIR"
    )


def make_opener(settings: PipSettings, host: str) -> urllib.request.OpenerDirector:
    """Builds an opener for one host: pip's certificates, proxy and trusted hosts.

    Args:
        settings: From `read_pip_settings`.
        host: `name` or `name:port` of the requests.
    """
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.HTTPSHandler(context=_tls_context(settings, host, os.environ))
    ]
    if settings.proxy:
        proxies = {"http": settings.proxy, "https": settings.proxy}
        handlers.append(urllib.request.ProxyHandler(proxies))
    return urllib.request.build_opener(*handlers)


def _tls_context(
    settings: PipSettings, host: str, environment: Mapping[str, str]
) -> ssl.SSLContext:
    bundle = settings.cert
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        bundle = bundle or environment.get(name)
    try:
        if bundle:
            is_folder = Path(bundle).is_dir()
            context = ssl.create_default_context(
                cafile=None if is_folder else bundle, capath=bundle if is_folder else None
            )
        else:
            context = ssl.create_default_context()
            # A Python without the system's certificates (some installers) still has pip's own.
            if own := importlib.util.find_spec("pip._vendor.certifi"):
                own_bundle = Path(own.origin or "").with_name("cacert.pem")
                if own_bundle.is_file():
                    context.load_verify_locations(own_bundle)
        if settings.client_cert:
            context.load_cert_chain(settings.client_cert)
    except OSError as error:
        raise UserError(
            f"pip's certificates: {bundle or settings.client_cert}: cannot be read ({error}): "
            "mend pip's `cert` setting"
        ) from error
    if host in settings.trusted_hosts or host.partition(":")[0] in settings.trusted_hosts:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def split_credentials(url: str) -> tuple[str, str | None, str | None]:
    """Takes `user:password@` out of a URL.

    Returns:
        The URL without them, the user and the password (None where absent), unquoted.
    """
    parts = urllib.parse.urlsplit(url)
    if "@" not in parts.netloc:
        return url, None, None
    credentials, _, host = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    bare = urllib.parse.urlunsplit(parts._replace(netloc=host))
    return bare, urllib.parse.unquote(user), urllib.parse.unquote(password)
