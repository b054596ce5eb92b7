"""A real MLflow server on this machine, and one in front of it that misbehaves."""

import base64
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Server:
    """`mlflow server` with its store in `folder`."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.uri, self.store = f"http://127.0.0.1:{self.port}", folder / "server.db"
        folder.mkdir(parents=True, exist_ok=True)

    def start(self):
        command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.store}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # else seven processes more
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return self
            except (OSError, http.client.HTTPException):
                assert self.process.poll() is None and time.monotonic() < deadline
            finally:
                connection.close()
            time.sleep(0.2)

    def kill(self):
        os.killpg(self.process.pid, 9)
        self.process.wait()


@contextmanager
def serving(folder):
    server = Server(folder).start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def in_front_of(server, faulty=lambda: None, password=None):
    """Pass requests on to a Server, after `faulty()`: it may wait, and a status that it returns is answered at once.
    With `password`, as "name:password", another login is refused. Yields the address."""
    login = password and "Basic " + base64.b64encode(password.encode()).decode()

    class Forward(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content, kind = faulty(), b"no", "text/plain"
            if login and self.headers.get("Authorization") != login:
                status = 401
            if status is None:
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                headers = {key: value for key, value in self.headers.items() if key.lower() != "host"}
                with closing(connection):
                    connection.request(self.command, self.path, body, headers)
                    answer = connection.getresponse()
                    status, content, kind = answer.status, answer.read(), answer.getheader("Content-Type", kind)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do  # noqa: N815

        def log_message(self, *arguments):
            pass

    class Front(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments):  # a client that was killed
            pass

    with Front(("127.0.0.1", 0), Forward) as front:
        threading.Thread(target=front.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{front.server_port}"
        front.shutdown()
