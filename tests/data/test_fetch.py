"""Fetching and unpacking, against a small archive and a server on this machine that can misbehave."""

import errno
import hashlib
import io
import random
import re
import shutil
import socket
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import fails

from pipeline.data import fetch
from pipeline.errors import StageError, UsageError

ROOT = Path(__file__).resolve().parents[2]
BATCHES = {name: random.Random(name).randbytes(100_000) for name in fetch.BATCH_MD5}


def md5(data):
    return hashlib.md5(data).hexdigest()


def pack(contents):
    """A .tar.gz of `{name: content}`."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


ARCHIVE = pack({f"{fetch.BATCHES}/{name}": data for name, data in [*BATCHES.items(), ("readme.html", b"")]})
SIZE = len(ARCHIVE)
CUT = 300_000


class Mirror(BaseHTTPRequestHandler):
    """The first word of the path says how it behaves."""

    def do_GET(self):
        asked = self.headers["Range"]
        how = self.path.strip("/").split("/")[0]
        self.server.requests.append((how, asked))
        page = (b"<html>please log in</html>", {"Content-Type": "text/html"})
        if how == "missing":
            return self.answer(404, b"no such file")
        if how == "page":
            return self.answer(200, *page)
        if how == "page-of-any-length":
            return self.answer(200, *page, length=None)
        if how == "refuses-range" and asked:
            return self.answer(416, b"", {"Content-Range": f"bytes */{SIZE}"})

        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and how != "ignores-range" else 0
        whole = {"wrong": bytes(SIZE), "short": ARCHIVE[:CUT], "long": ARCHIVE + b"more", "endless": ARCHIVE + b"more"}
        body = whole.get(how, ARCHIVE)[start:]
        status, headers = 200, {"Content-Type": "application/x-gzip", "Content-Encoding": "x-gzip"}
        if start:
            first = start + (how == "elsewhere")
            status, headers["Content-Range"] = 206, f"bytes {first}-{SIZE - 1}/{SIZE}"
        length = None if how in ("endless", "silent-end") else len(body)
        self.answer(status, body[:CUT] if how in ("cut", "stall", "silent-end") else body, headers, length)
        if how == "stall":
            self.server.released.wait(10)
        return None

    def answer(self, status, body, headers=None, length=-1):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Mirror)
        self.requests, self.connections, self.released = [], 0, threading.Event()

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the tests

    def urls(self, *hows):
        return [f"http://127.0.0.1:{self.server_port}/{how}/archive.tar.gz" for how in hows]


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """The small archive stands for the published one, and no proxy of this machine is in the way."""
    monkeypatch.setattr(fetch, "ARCHIVE_MD5", md5(ARCHIVE))
    monkeypatch.setattr(fetch, "ARCHIVE_BYTES", SIZE)
    monkeypatch.setattr(fetch, "BATCH_MD5", {name: md5(data) for name, data in BATCHES.items()})
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data" / "raw"


def part_of(data):
    return data / f"{fetch.ARCHIVE}.{md5(ARCHIVE)}.part"


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def put_batches(data):
    for name, content in BATCHES.items():
        put(data / fetch.BATCHES / name, content)


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# What is there already


def test_our_digests_are_those_of_torchvision(monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.undo()
    meta = CIFAR10.meta
    assert dict([*CIFAR10.train_list, *CIFAR10.test_list, (meta["filename"], meta["md5"])]) == fetch.BATCH_MD5
    assert (CIFAR10.filename, CIFAR10.tgz_md5) == (fetch.ARCHIVE, fetch.ARCHIVE_MD5)
    assert CIFAR10.base_folder == fetch.BATCHES


def test_fetched_once(data, server):
    assert not fetch.cifar10_present(data)
    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert fetch.cifar10_present(data)
    assert {p.name for p in data.iterdir()} == {fetch.ARCHIVE, fetch.BATCHES}
    assert (data / fetch.ARCHIVE).read_bytes() == ARCHIVE
    assert server.requests == [("good", None)]
    connections = server.connections
    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert server.connections == connections  # not even a probe


@pytest.mark.parametrize("on_disk", ["batches", "archive"])
def test_what_is_on_disk_is_used_without_a_network(data, server, on_disk):
    if on_disk == "batches":
        put_batches(data)
    else:
        put(data / fetch.ARCHIVE, ARCHIVE)
    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert fetch.cifar10_present(data)
    assert (data / fetch.ARCHIVE).exists() == (on_disk == "archive")
    assert server.connections == 0


@pytest.mark.parametrize("content", [ARCHIVE[:-1], b""], ids=["cut", "empty"])
def test_wrong_archive_put_by_hand_is_named_and_kept(data, server, content):
    path = put(data / fetch.ARCHIVE, content)
    message = fails(UsageError, fetch.fetch_cifar10, data, server.urls("good"), 5)
    assert all(word in message for word in (str(path), md5(content), md5(ARCHIVE), "replace"))
    assert tree(data) == {Path(fetch.ARCHIVE): content}
    assert server.connections == 0


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_batches_come_again_from_the_archive(data, server, damage):
    put(data / fetch.ARCHIVE, ARCHIVE)
    put_batches(data)
    batch = data / fetch.BATCHES / "data_batch_3"
    if damage == "changed":
        batch.write_bytes(b"evil" + BATCHES["data_batch_3"][4:])
    else:
        batch.unlink()
    assert not fetch.cifar10_present(data)
    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert batch.read_bytes() == BATCHES["data_batch_3"]
    assert {p.name for p in data.iterdir()} == {fetch.ARCHIVE, fetch.BATCHES}
    assert server.connections == 0


def test_unreadable_batch_is_named(data, server):
    batch = data / fetch.BATCHES / "data_batch_1"
    batch.mkdir(parents=True)
    assert str(batch) in fails(StageError, fetch.fetch_cifar10, data, server.urls("good"), 5)


# The download


def test_a_cut_download_is_resumed(data, server, capsys):
    assert "127.0.0.1 broke" in fails(StageError, fetch.fetch_cifar10, data, server.urls("cut"), 5)
    size = part_of(data).stat().st_size
    assert 0 < size <= CUT and part_of(data).read_bytes() == ARCHIVE[:size]
    assert not (data / fetch.ARCHIVE).exists()

    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert server.requests == [("cut", None), ("good", f"bytes={size}-")]
    assert fetch.cifar10_present(data)
    assert not part_of(data).exists()
    assert "\r" not in capsys.readouterr().err  # no bar where nobody watches


def test_a_stalling_mirror_gives_way_to_the_next(data, server):
    fetch.fetch_cifar10(data, server.urls("stall", "good"), 1.0)
    assert fetch.cifar10_present(data)
    (_, first), (how, then) = server.requests
    assert (first, how) == (None, "good")
    assert 0 < int(then.removeprefix("bytes=").removesuffix("-")) <= CUT


def test_a_mirror_that_only_stalls_is_named(data, server):
    assert "127.0.0.1 was silent for 0.3 s" in fails(StageError, fetch.fetch_cifar10, data, server.urls("stall"), 0.3)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "answered 404"),
        ("page", "offered 26 bytes of text/html"),
        ("short", f"offered {CUT} bytes"),
        ("long", f"offered {SIZE + 4} bytes"),
        ("endless", "sent more than"),
        ("silent-end", f"ended after {CUT} of {SIZE} bytes"),
        ("wrong", f"sent another file (md5 {md5(bytes(SIZE))})"),
    ],
)
def test_a_bad_mirror(data, server, how, says):
    message = fails(StageError, fetch.fetch_cifar10, data, server.urls(how), 5)
    assert f"127.0.0.1 {says}" in message
    assert str(data) in message  # where to put it by hand
    assert not (data / fetch.ARCHIVE).exists()
    assert not (data / fetch.BATCHES).exists()
    assert part_of(data).exists() == (how in ("endless", "silent-end"))

    fetch.fetch_cifar10(data, server.urls(how, "good"), 5)
    assert fetch.cifar10_present(data)


@pytest.mark.parametrize("how", ["missing", "page-of-any-length", "long"])
def test_a_bad_mirror_leaves_what_was_fetched(data, server, how):
    put(part_of(data), ARCHIVE[:CUT])
    fails(StageError, fetch.fetch_cifar10, data, server.urls(how), 5)
    assert part_of(data).read_bytes() == ARCHIVE[:CUT]


@pytest.mark.parametrize("how", ["ignores-range", "refuses-range", "elsewhere"])
def test_a_mirror_that_will_not_continue_sends_it_all(data, server, how):
    put(part_of(data), ARCHIVE[:CUT])
    fetch.fetch_cifar10(data, server.urls(how), 5)
    assert fetch.cifar10_present(data)
    assert server.requests[0] == (how, f"bytes={CUT}-")
    assert server.requests[1:] == ([] if how == "ignores-range" else [(how, None)])


@pytest.mark.parametrize(
    ("part", "requests"),
    [
        (ARCHIVE, []),
        (bytes(CUT), [("good", f"bytes={CUT}-"), ("good", None)]),
        (bytes(SIZE), [("good", None)]),
        (bytes(SIZE + 1), [("good", None)]),
    ],
    ids=["whole", "some", "all", "more"],
)
def test_only_a_damaged_part_is_fetched_anew(data, server, part, requests):
    put(part_of(data), part)
    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert fetch.cifar10_present(data)
    assert server.requests == requests


def test_one_clean_retry_then_the_next_mirror(data, server):
    put(part_of(data), ARCHIVE[:CUT])
    fetch.fetch_cifar10(data, server.urls("wrong", "good"), 5)
    assert server.requests == [("wrong", f"bytes={CUT}-"), ("wrong", None), ("good", None)]


def test_offline(data):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/archive.tar.gz"
        message = fails(StageError, fetch.fetch_cifar10, data, [url, "no address"], 5)
    assert f"no answer from {url}, no address" in message
    assert not data.exists()


def test_a_bar_on_a_terminal(data, server, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert "100%" in capsys.readouterr().err


# The disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_no_space_for_the_download(data, server):
    data.mkdir(parents=True)
    part_of(data).symlink_to("/dev/full")
    assert "no disk space" in fails(StageError, fetch.fetch_cifar10, data, server.urls("good", "good"), 5)
    assert len(server.requests) == 1  # another mirror would not help


def test_no_space_to_unpack(data, server, monkeypatch):
    put(data / fetch.ARCHIVE, ARCHIVE)
    put(data / fetch.BATCHES / "data_batch_1", b"damaged")
    before = tree(data)

    def copy_some(source, target):
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", copy_some)
        assert "no disk space" in fails(StageError, fetch.fetch_cifar10, data, server.urls("good"), 5)
    assert tree(data) == before

    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert fetch.cifar10_present(data)


def test_a_sound_archive_with_other_batches_is_not_taken(data, server, monkeypatch):
    put(data / fetch.ARCHIVE, ARCHIVE)
    monkeypatch.setitem(fetch.BATCH_MD5, "test_batch", "0" * 32)
    assert "is the disk sound" in fails(StageError, fetch.fetch_cifar10, data, server.urls("good"), 5)


def test_only_the_batches_are_unpacked(data, server, monkeypatch):
    hostile = {f"{fetch.BATCHES}/../evil": b"evil", "/tmp/trainmark-evil": b"evil", f"{fetch.BATCHES}/evil": b"evil"}
    content = pack(hostile | {f"{fetch.BATCHES}/{name}": batch for name, batch in BATCHES.items()})
    monkeypatch.setattr(fetch, "ARCHIVE_MD5", md5(content))
    put(data / fetch.ARCHIVE, content)
    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert {path.name for path in data.rglob("*") if path.is_file()} == {fetch.ARCHIVE, *BATCHES}
    assert not Path("/tmp/trainmark-evil").exists()


# Who answers


def test_reachable_in_the_given_order(server):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        first, second = server.urls("b", "a")
        bad = ["", "no address", "http://", "http://[", f"http://:{server.server_port}/no-host"]
        assert fetch.reachable([first, gone, *bad, second]) == [first, second]
        assert server.connections <= 1  # one probe a host
    assert server.requests == []


def test_nobody_waits_for_a_name_that_is_looked_up_for_ever(monkeypatch):
    released = threading.Event()
    ended = []

    def look_up(*_, **__):
        ended.append(released.wait(60))
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert fetch.reachable(["https://a.invalid/x", "https://b.invalid/x"], timeout_seconds=0.2) == []
    assert ended == []
    released.set()


def test_the_proxy_is_probed(server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.server_port}")
    assert fetch.reachable(["https://mirror.invalid/x"])
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert fetch.reachable(["https://mirror.invalid/x"]) == []
