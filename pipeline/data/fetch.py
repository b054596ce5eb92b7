"""CIFAR-10 as it was published: fetched once, continued when cut, its digests checked at every use.

No torch in here: asking whether the data is there must stay quick.
"""

import gzip
import hashlib
import os
import re
import shutil
import socket
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import requests
from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy
from tqdm import tqdm
from urllib3.exceptions import HTTPError, ReadTimeoutError

from pipeline.errors import StageError, UsageError
from pipeline.files import cannot_write

# https://www.cs.toronto.edu/~kriz/cifar.html; the batches' digests are those of torchvision.datasets.CIFAR10
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
BATCHES = "cifar-10-batches-py"
BATCH_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}

MOST_UNPACKED_BYTES = 2**30
CHUNK_BYTES = 2**16


def cifar10_present(folder: Path) -> bool:
    """Whether `folder` holds CIFAR-10's batches, each with its published digest; about 0.3 s, no network.

    Raises StageError where a batch is there and can't be read.
    """
    return all(_md5(folder / BATCHES / name) == md5 for name, md5 in BATCH_MD5.items())


def cifar10(folder: Path, mirrors: Sequence[str], timeout_seconds: float) -> None:
    """Makes sure that `folder` holds CIFAR-10, so that torchvision.datasets.CIFAR10(folder) can load it.

    Takes what is there: good batches as they are, else a good archive, else the first mirror that has one.
    Batches that are damaged are replaced from the archive. Raises UsageError where an archive put there by
    hand is not the published one, StageError where there is none to be had or the disk won't take it.
    """
    if cifar10_present(folder):
        return
    path = archive(folder, mirrors, name=ARCHIVE, md5=ARCHIVE_MD5, size=ARCHIVE_BYTES, timeout_seconds=timeout_seconds)
    unpack(path, folder / BATCHES, ARCHIVE_MD5)
    if not cifar10_present(folder):
        raise StageError(f"{folder / BATCHES} is not what {path} held: is the disk sound?")


def archive(folder: Path, mirrors: Sequence[str], *, name: str, md5: str, size: int, timeout_seconds: float) -> Path:
    """The path of the archive `name` in `folder`, its digest checked; fetched where it is not there yet.

    `size` is in bytes; a mirror that is silent for `timeout_seconds` gives way to the next, which continues
    the same `.part` file. What was fetched stays for the next call when all mirrors fail.
    Raises UsageError where the file is there with another digest: it only gets its name once its digest is
    right, so that one was put there by hand, and is left alone. Raises StageError where no mirror has it.
    """
    path = folder / name
    found = _md5(path)
    if found == md5:
        return path
    if found:
        raise _not_published(path, found, md5)
    by_hand = f"or put {name} in {folder} by hand"
    mirrors_up = any_reachable(mirrors)
    if not mirrors_up:
        raise StageError(f"can't fetch {name}: no answer from {', '.join(mirrors)}: try again, {by_hand}")

    part = folder / f"{name}.{md5}.part"
    problems = []
    for url in mirrors_up:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(url, part, md5=md5, size=size, timeout_seconds=timeout_seconds)
            part.replace(path)
        except (requests.RequestException, HTTPError) as error:
            problems.append(f"{urlsplit(url).hostname} {_reason(error, timeout_seconds)}")
        except OSError as error:
            raise cannot_write(path, error) from error
        else:
            print(f"fetched {path}: its digest is right", file=sys.stderr)
            return path
    raise StageError(f"can't fetch {name}: {'; '.join(problems)}: try again, {by_hand}")


def unpack(path: Path, into: Path, md5: str) -> None:
    """Replaces the folder `into` by the folder of that name in the archive `path`, whole or not at all.

    Raises UsageError where the archive's digest isn't `md5`, and StageError where it holds anything but plain
    files, each directly in that folder, or more than MOST_UNPACKED_BYTES, or where the disk won't take it.
    """
    try:
        with (
            path.open("rb") as file,
            TemporaryDirectory(dir=into.parent, prefix=f".{into.name}.", ignore_cleanup_errors=True) as aside,
        ):
            found = _digest(file)
            if found != md5:
                raise _not_published(path, found, md5)
            print(f"unpacking {path}", file=sys.stderr)
            file.seek(0)
            fresh = Path(aside, "fresh")
            fresh.mkdir()
            with tarfile.open(fileobj=file, mode="r:gz") as tar:
                _extract(tar, into.name, fresh)
            if os.path.lexists(into):
                into.rename(Path(aside, "replaced"))  # Windows renames no folder onto another
            fresh.rename(into)
    except (ValueError, tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StageError(f"{path} can't be unpacked: {error}") from error
    except OSError as error:
        raise cannot_write(into, error) from error


def reachable(url: str, timeout: float = 3.0) -> bool:
    """Whether the host of `url`, or the proxy on the way, takes a connection; after `timeout` seconds: no."""
    return any_reachable([url], timeout) == [url]


def any_reachable(urls: Iterable[str], timeout: float = 3.0) -> list[str]:
    """Those of `urls` whose host, or the proxy on the way, takes a connection; `timeout` seconds in all."""
    urls = list(urls)
    up: set[str] = set()

    def probe(site: str) -> None:
        try:
            proxy = select_proxy(site, get_environ_proxies(site))
            parts = urlsplit(prepend_scheme_if_needed(proxy, "http") if proxy else site)  # type: ignore[no-untyped-call]
            port = parts.port or (443 if parts.scheme == "https" else 80)
            if parts.hostname is None:
                return
            # half the time for an address, so that a dead IPv6 route leaves time for IPv4
            socket.create_connection((parts.hostname, port), timeout / 2).close()
            up.add(site)
        except (OSError, ValueError, HTTPError):
            pass

    # threads: looking up a name has no time-out; daemons: one that hangs must not hold up the exit
    probes = [threading.Thread(target=probe, args=(s,), daemon=True) for s in {_site(url) for url in urls}]
    for thread in probes:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in probes:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [url for url in urls if _site(url) in up]


def _extract(tar: tarfile.TarFile, folder: str, fresh: Path) -> None:
    """Copies the files of `folder` in the archive into `fresh`. Raises ValueError at anything else.

    Done here: tarfile's data filter lets links and deeper folders through, and is missing before 3.11.4.
    """
    inside = re.compile(rf"{re.escape(folder)}/(\w[\w.-]*)", re.ASCII)
    room = MOST_UNPACKED_BYTES
    for member in tar:
        if member.isdir() and member.name == folder:
            continue
        name = inside.fullmatch(member.name)
        content = tar.extractfile(member) if name and member.isreg() else None
        if name is None or content is None:
            raise ValueError(f"it holds {member.name!r}, which is no plain file of {folder}")
        room -= member.size
        if room < 0:
            raise ValueError(f"it holds more than {MOST_UNPACKED_BYTES} bytes")
        with content, (fresh / name[1]).open("xb") as target:
            shutil.copyfileobj(content, target)


def _site(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


def _digest(file: BufferedReader) -> str:
    # usedforsecurity: machines in FIPS mode refuse MD5 otherwise
    return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5(path: Path) -> str | None:
    """The file's MD5; None where there is no file."""
    try:
        with path.open("rb") as file:
            return _digest(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StageError(f"can't read {path}: {error.strerror or error}") from error


def _not_published(path: Path, found: str, md5: str) -> UsageError:
    return UsageError(f"{path} is not the published file (md5 {found}, not {md5}): replace or remove it")


def _fetch(url: str, part: Path, *, md5: str, size: int, timeout_seconds: float) -> None:
    """Completes `part` from `url`; deletes it and raises requests.HTTPError where its digest is wrong."""
    continued = _download(url, part, size, timeout_seconds)
    if continued and _md5(part) != md5:
        part.unlink()  # the fault may be in the bytes of an earlier try: once more, all of them from here
        _download(url, part, size, timeout_seconds)
    found = _md5(part)
    if found != md5:
        part.unlink()
        raise requests.HTTPError(f"sent another file (md5 {found})")


def _download(url: str, part: Path, size: int, timeout_seconds: float) -> bool:
    """Makes `part` `size` bytes long from `url`; True where some were there already.

    Raises what requests and urllib3 raise, and requests.HTTPError for an answer that won't do.
    """
    offset = part.stat().st_size if part.exists() else 0
    if offset == size:
        return True
    if offset > size:
        offset = 0
    response = _get(url, offset, timeout_seconds)
    if offset and not _continues(response, offset):
        offset = 0
        if response.status_code != 200:
            response.close()
            response = _get(url, 0, timeout_seconds)
    with response:
        if response.status_code != (206 if offset else 200):
            raise requests.HTTPError(f"answered {response.status_code} {response.reason}")
        kind = response.headers.get("Content-Type", "")
        length = response.headers.get("Content-Length", str(size - offset))
        if kind.startswith("text/") or length != str(size - offset):
            raise requests.HTTPError(f"offered {length} bytes of {kind or 'something'}, not the archive")

        start = f", continued at {offset / 1e6:.0f} MB" if offset else ""
        print(f"fetching {url} ({size / 1e6:.0f} MB{start})", file=sys.stderr)
        with (
            part.open("ab" if offset else "wb") as file,
            # disable=None: no bar where stderr is no terminal
            tqdm(total=size, initial=offset, unit="B", unit_scale=True, disable=None) as bar,
        ):
            # as sent: some servers call the archive's own compression a Content-Encoding
            for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > size:
                    raise requests.HTTPError(f"sent more than the archive's {size} bytes")
            if file.tell() < size:
                raise requests.HTTPError(f"ended after {file.tell()} of {size} bytes")
            file.flush()
            os.fsync(file.fileno())
    return offset > 0


def _get(url: str, offset: int, timeout_seconds: float) -> requests.Response:
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    return requests.get(url, headers=headers, stream=True, timeout=timeout_seconds)


def _continues(response: requests.Response, offset: int) -> bool:
    sent = response.headers.get("Content-Range", "")
    return response.status_code == 206 and sent.startswith(f"bytes {offset}-")


def _reason(error: Exception, timeout_seconds: float) -> str:
    """In a few words: what requests and urllib3 say runs over lines of objects and addresses."""
    if isinstance(error, requests.HTTPError):
        return str(error)
    if isinstance(error, requests.Timeout | ReadTimeoutError):
        return f"was silent for {timeout_seconds:g} s"
    return f"broke the connection ({type(error).__name__})"
