"""As much of a W&B server as its client needs to log, resume and sync runs: what it is sent is kept for the test."""

import contextlib
import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0123456789abcdef" * 2 + "01234567"


class FakeServer:
    """Listens on a port of its own until the block ends.

    Attributes:
        requests: method and path of everything that was asked, oldest first.
        runs: by identifier, what was said of the run when it was made or changed.
    """

    def __init__(self):
        self.requests, self.runs, self._lines = [], {}, {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def history(self, run):
        """Rows of a run, in the order of their lines."""
        return [json.loads(line) for _, line in sorted(self._lines.get((run, "wandb-history.jsonl"), {}).items())]

    def steps(self, run):
        return [row["_step"] for row in self.history(run)]

    def answer(self, method, path, body):
        with self._lock:
            self.requests.append((method, path))
            if path.endswith("/graphql"):
                question = json.loads(body)
                operation = re.search(r"(?:query|mutation)\s+(\w+)", question["query"]).group(1)
                return {"data": getattr(self, f"_{operation}", lambda **_: {})(**(question.get("variables") or {}))}
            stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path)
            if stream:
                for name, part in (json.loads(body).get("files") or {}).items():
                    lines = self._lines.setdefault((stream.group(1), name), {})
                    lines.update({part["offset"] + index: line for index, line in enumerate(part["content"])})
            return {"exitcode": None, "limits": {}}

    def _bucket(self, name):
        lines = {kind: len(self._lines.get((name, f"wandb-{kind}.jsonl"), ())) for kind in ("history", "events")}
        tail = json.dumps([json.dumps(row) for row in self.history(name)[-1:]])
        return {
            "id": "b",
            "name": name,
            "displayName": self.runs[name].get("displayName"),
            "config": "{}",
            "summaryMetrics": "{}",
            "sweepName": None,
            "historyLineCount": lines["history"],
            "eventsLineCount": lines["events"],
            "logLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
            "tags": [],
            "project": {"id": "p", "name": "entreg", "entity": {"id": "e", "name": "me"}},
        }

    def _UpsertBucket(self, name, **said):
        is_new = name not in self.runs
        known = self.runs.setdefault(name, {})
        known.update({key: value for key, value in said.items() if value is not None})
        return {"upsertBucket": {"bucket": self._bucket(name), "inserted": is_new}}

    def _RunResumeStatus(self, name, **_):
        bucket = self._bucket(name) if name in self.runs else None
        return {"model": {"id": "p", "name": "entreg", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def _CreateRunFiles(self, run, files, **_):
        places = [{"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"} for name in files]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": places}}


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _answer(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            content = json.dumps(server.answer(self.command, self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _answer

        def _chunk(self):
            size = int(self.rfile.readline(), 16)
            content = self.rfile.read(size)
            self.rfile.readline()
            return content

        def handle(self):
            # Clients that are done hang up.
            with contextlib.suppress(ConnectionError):
                super().handle()

    return Handler
