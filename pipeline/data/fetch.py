"""Download CIFAR-10's archive once, resume an interrupted download, and check the digest at every use."""

import hashlib
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy
from tqdm import tqdm
from urllib3.exceptions import HTTPError, ReadTimeoutError

from pipeline import terminal
from pipeline.errors import StageError, UsageError
from pipeline.files import write_error

ARCHIVE = "cifar-10-python.tar.gz"  # https://www.cs.toronto.edu/~kriz/cifar.html
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
CHUNK_BYTES = 2**16


def fetch_cifar10(folder: Path, mirrors: Sequence[str], timeout_seconds: float) -> Path:
    """The path of CIFAR-10's archive in `folder`. Downloads the archive if it is missing, and checks its digest.

    The mirrors are tried in order. After `timeout_seconds` of silence, the next one continues the same `.part` file. If
    all fail, that file stays, and the next call continues it. It is renamed once its digest is right. So the user must
    have put an archive with another digest there: it is not touched.

    Raises UsageError for such an archive, and StageError if no mirror has the archive or the disk is full.
    """
    path = folder / ARCHIVE
    digest = _md5(path)
    if digest == ARCHIVE_MD5:
        return path
    if digest:
        raise UsageError(f"{path} is not the published file (md5 {digest}, not {ARCHIVE_MD5}): replace or remove it")
    by_hand = f"try again, or put {ARCHIVE} in {folder} by hand"
    reachable_mirrors = reachable(mirrors)
    if not reachable_mirrors:
        raise StageError(f"can't fetch {ARCHIVE}: no answer from {', '.join(mirrors)}: {by_hand}")

    part = folder / f"{ARCHIVE}.{ARCHIVE_MD5}.part"
    problems = []
    for url in reachable_mirrors:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _complete(part, url, timeout_seconds)
            part.replace(path)
        except (requests.RequestException, HTTPError, ValueError) as error:  # ValueError: an address that is none
            problems.append(f"{urlsplit(url).hostname} {_reason(error, timeout_seconds)}")
        except OSError as error:
            raise write_error(path, error) from error
        else:
            terminal.say_error(f"fetched {path}: its digest is right")
            return path
    raise StageError(f"can't fetch {ARCHIVE}: {'; '.join(problems)}: {by_hand}")


def reachable(urls: Sequence[str], timeout_seconds: float = 3.0) -> list[str]:
    """The `urls` whose host, or the proxy in between, accepts a connection within `timeout_seconds`."""
    sites = {url: "/".join(url.split("/", 3)[:3]) for url in urls}
    reachable_sites: set[str] = set()

    def probe(site: str) -> None:
        try:
            proxy = select_proxy(site, get_environ_proxies(site))
            address = prepend_scheme_if_needed(proxy, "http") if proxy else site  # type: ignore[no-untyped-call]
            parts = urlsplit(address)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            if parts.hostname is None:
                return
            # Use half the time for each address, so that a dead IPv6 route leaves time for IPv4.
            socket.create_connection((parts.hostname, port), timeout_seconds / 2).close()
            reachable_sites.add(site)
        except (OSError, ValueError, HTTPError):
            pass

    # Use threads, since looking up a name has no timeout, and daemons, so that a hanging one does not delay the exit.
    probes = [threading.Thread(target=probe, args=(site,), daemon=True) for site in set(sites.values())]
    for thread in probes:
        thread.start()
    deadline = time.monotonic() + timeout_seconds
    for thread in probes:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [url for url, site in sites.items() if site in reachable_sites]


def _md5(path: Path) -> str | None:
    """The file's MD5; None if there is no file."""
    try:
        with path.open("rb") as file:
            # Without usedforsecurity=False, machines in FIPS mode refuse MD5.
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StageError(f"can't read {path}: {error.strerror or error}") from error


def _complete(part: Path, url: str, timeout_seconds: float) -> None:
    """Complete `part` from `url`. Raises requests.HTTPError, and deletes `part`, if its digest is wrong."""
    resumed = _download(url, part, timeout_seconds)
    if resumed and _md5(part) != ARCHIVE_MD5:
        part.unlink()  # the bytes of an earlier call may be wrong, so download all of them once
        _download(url, part, timeout_seconds)
    digest = _md5(part)
    if digest != ARCHIVE_MD5:
        part.unlink()
        raise requests.HTTPError(f"sent another file (md5 {digest})")


def _download(url: str, part: Path, timeout_seconds: float) -> bool:
    """Download the rest of `part` from `url`. Returns whether it used bytes of an earlier call.

    Raises errors of requests and urllib3, and requests.HTTPError for an unusable response.
    """
    offset = part.stat().st_size if part.exists() else 0
    if offset == ARCHIVE_BYTES:
        return True
    if offset > ARCHIVE_BYTES:
        offset = 0
    response = _get(url, offset, timeout_seconds)
    if offset and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        offset = 0
        if response.status_code != 200:  # 200: the mirror ignores the range and sends all
            response.close()
            response = _get(url, 0, timeout_seconds)
    with response:
        _check(response, offset)
        start = f", continued at {offset / 1e6:.0f} MB" if offset else ""
        terminal.say_error(f"fetching {url} ({ARCHIVE_BYTES / 1e6:.0f} MB{start})")
        with (
            part.open("ab" if offset else "wb") as file,
            # disable=None: show no bar if stderr is no terminal
            tqdm(total=ARCHIVE_BYTES, initial=offset, unit="B", unit_scale=True, disable=None) as bar,
        ):
            # Don't decode: some servers declare the archive's own compression as Content-Encoding.
            for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > ARCHIVE_BYTES:
                    raise requests.HTTPError(f"sent more than the archive's {ARCHIVE_BYTES} bytes")
            if file.tell() < ARCHIVE_BYTES:
                raise requests.HTTPError(f"ended after {file.tell()} of {ARCHIVE_BYTES} bytes")
    return offset > 0


def _get(url: str, offset: int, timeout_seconds: float) -> requests.Response:
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    return requests.get(url, headers=headers, stream=True, timeout=timeout_seconds)


def _check(response: requests.Response, offset: int) -> None:
    """Raise requests.HTTPError unless the response contains the archive from `offset` on."""
    if response.status_code != (206 if offset else 200):
        raise requests.HTTPError(f"answered {response.status_code} {response.reason}")
    kind = response.headers.get("Content-Type", "")
    length = response.headers.get("Content-Length", str(ARCHIVE_BYTES - offset))
    if kind.startswith("text/") or length != str(ARCHIVE_BYTES - offset):
        raise requests.HTTPError(f"offered {length} bytes of {kind or 'something'}, not the archive")


def _reason(error: Exception, timeout_seconds: float) -> str:
    """The error in a few words. The messages of requests and urllib3 are long, and full of objects and addresses."""
    if isinstance(error, requests.HTTPError):
        return str(error)
    if isinstance(error, requests.Timeout | ReadTimeoutError):
        return f"was silent for {timeout_seconds:g} s"
    if isinstance(error, requests.TooManyRedirects):
        return "redirects in circles"
    if isinstance(error, ValueError):
        return "redirects to an address that is none"
    return f"broke the connection ({type(error).__name__})"
