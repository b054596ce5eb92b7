"""Downloads of a small archive from a server on this machine that can misbehave."""

import hashlib
import random
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import fails

from pipeline.data import fetch
from pipeline.errors import StageError, UsageError


def md5(data):
    return hashlib.md5(data).hexdigest()


ARCHIVE = random.Random(0).randbytes(700_000)
SIZE = len(ARCHIVE)
CUT = 300_000


REDIRECTS = {
    "circle": "/circle/archive.tar.gz",
    "no-address": "http://[::1/archive.tar.gz",
    "no-scheme-of-ours": "magnet:?xt=1",
    "long-name": f"http://{'a' * 70}.example/archive.tar.gz",
}


class Mirror(BaseHTTPRequestHandler):
    """A server whose behaviour is the first word of the path."""

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
        if how in REDIRECTS:
            return self.answer(302, b"", {"Location": REDIRECTS[how]})
        if how == "refuses-range" and asked:
            return self.answer(416, b"", {"Content-Range": f"bytes */{SIZE}"})

        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and how != "ignores-range" else 0
        whole = {
            "wrong": bytes(SIZE),
            "empty": b"",
            "short": ARCHIVE[:CUT],
            "long": ARCHIVE + b"more",
            "endless": ARCHIVE + b"more",
        }
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
    """Use the small archive in place of the published one, and no proxy of this machine."""
    monkeypatch.setattr(fetch, "ARCHIVE_MD5", md5(ARCHIVE))
    monkeypatch.setattr(fetch, "ARCHIVE_BYTES", SIZE)
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


def assert_fetched(data):
    """Assert that the folder contains the complete archive and nothing else."""
    assert {path.name: path.read_bytes() for path in data.iterdir()} == {fetch.ARCHIVE: ARCHIVE}


# What is there already


def test_our_digest_is_that_of_torchvision(monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.undo()
    assert (CIFAR10.filename, CIFAR10.tgz_md5) == (fetch.ARCHIVE, fetch.ARCHIVE_MD5)


def test_an_archive_is_downloaded_once(data, server):
    assert fetch.fetch_cifar10(data, server.urls("good"), 5) == data / fetch.ARCHIVE
    assert_fetched(data)
    assert server.requests == [("good", None)]
    connections = server.connections
    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert server.connections == connections  # not even a probe


def test_an_archive_put_there_by_hand_is_used(data, server):
    put(data / fetch.ARCHIVE, ARCHIVE)
    assert fetch.fetch_cifar10(data, server.urls("good"), 5) == data / fetch.ARCHIVE
    assert server.connections == 0


@pytest.mark.parametrize("content", [ARCHIVE[:-1], b""], ids=["cut", "empty"])
def test_wrong_archive_put_by_hand_is_named_and_kept(data, server, content):
    path = put(data / fetch.ARCHIVE, content)
    message = fails(UsageError, fetch.fetch_cifar10, data, server.urls("good"), 5)
    assert all(word in message for word in (str(path), md5(content), md5(ARCHIVE), "replace"))
    assert [file.read_bytes() for file in data.iterdir()] == [content]
    assert server.connections == 0


# The download


def test_an_interrupted_download_is_resumed(data, server, capsys):
    assert "127.0.0.1 broke" in fails(StageError, fetch.fetch_cifar10, data, server.urls("cut"), 5)
    size = part_of(data).stat().st_size
    assert 0 < size <= CUT and part_of(data).read_bytes() == ARCHIVE[:size]
    assert not (data / fetch.ARCHIVE).exists()

    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert server.requests == [("cut", None), ("good", f"bytes={size}-")]
    assert_fetched(data)
    assert "\r" not in capsys.readouterr().err  # no bar where nobody watches


def test_a_stalling_mirror_gives_way_to_the_next(data, server):
    fetch.fetch_cifar10(data, server.urls("stall", "good"), 1.0)
    assert_fetched(data)
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
        *((how, "redirects") for how in REDIRECTS),
        ("empty", "offered 0 bytes"),
        ("wrong", f"sent another file (md5 {md5(bytes(SIZE))})"),
    ],
)
def test_a_bad_mirror_is_named_and_the_next_one_used(data, server, how, says):
    message = fails(StageError, fetch.fetch_cifar10, data, server.urls(how), 5)
    assert f"127.0.0.1 {says}" in message
    assert str(data) in message  # where to put it by hand
    assert not (data / fetch.ARCHIVE).exists()
    assert part_of(data).exists() == (how in ("endless", "silent-end"))

    fetch.fetch_cifar10(data, server.urls(how, "good"), 5)
    assert_fetched(data)


@pytest.mark.parametrize("how", ["ignores-range", "refuses-range", "elsewhere"])
def test_a_mirror_that_ignores_ranges_sends_the_whole_archive(data, server, how):
    put(part_of(data), ARCHIVE[:CUT])
    fetch.fetch_cifar10(data, server.urls(how), 5)
    assert_fetched(data)
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
def test_only_a_damaged_part_is_downloaded_again(data, server, part, requests):
    put(part_of(data), part)
    fetch.fetch_cifar10(data, server.urls("good"), 5)
    assert_fetched(data)
    assert server.requests == requests


def test_no_reachable_mirror_is_an_error(data):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/archive.tar.gz"
        message = fails(StageError, fetch.fetch_cifar10, data, [url, "no address"], 5)
    assert f"no answer from {url}, no address" in message
    assert not data.exists()


# The disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_ends_the_download(data, server):
    data.mkdir(parents=True)
    part_of(data).symlink_to("/dev/full")
    assert "no disk space" in fails(StageError, fetch.fetch_cifar10, data, server.urls("good", "good"), 5)
    assert len(server.requests) == 1  # another mirror would not help


# Who answers


def test_reachable_mirrors_keep_their_order(server):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        first, second = server.urls("b", "a")
        bad = ["", "no address", "http://", "http://[", f"http://:{server.server_port}/no-host"]
        assert fetch.reachable([first, gone, *bad, second]) == [first, second]
        assert server.connections <= 1  # one probe a host
    assert server.requests == []


def test_a_hanging_name_lookup_is_not_waited_for(monkeypatch):
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
