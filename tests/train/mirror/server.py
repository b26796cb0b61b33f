"""A W&B server on the loopback interface: as much of its GraphQL and file stream as wandb 0.31's own client asks for.

It keeps what a real one would show (the history of each run, its configuration, artifacts, files) and every byte that it was
sent, decompressed, for tests that look for what must not be among them.
"""

import gzip
import json
import re
import socket
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "loopback"
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
DECODERS: Mapping[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.decompress,
    "deflate": zlib.decompress,
}

Json = dict[str, Any]


@dataclass
class RunRecord:
    """One run as the server has it. history: lines by their offset in the history file, which is how W&B stores them."""

    history: dict[int, Json] = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    config: Json = field(default_factory=dict)
    fields: Json = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    def rows(self) -> list[Json]:
        """History in the order of the file."""
        return [self.history[offset] for offset in sorted(self.history)]


class WandbServer:
    """What arrived. runs: by run id. artifacts: what was created, in order. uploads: content by path."""

    def __init__(self) -> None:
        self.runs: dict[str, RunRecord] = {}
        self.artifacts: list[Json] = []
        self.uploads: dict[str, bytes] = {}
        self.received: list[bytes] = []
        self.operations: list[str] = []
        self.lock = threading.Lock()
        self.url = ""

    def everything(self) -> bytes:
        """All requests: request line, headers and decoded body."""
        with self.lock:
            return b"\n".join(self.received)

    # --- GraphQL -------------------------------------------------------------------------------------------------

    def answer(self, query: str, variables: Json) -> Json:
        """The `data` of one GraphQL operation; an operation that is not known is an error, so that a test sees it."""
        match = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        name = match[1] if match else "(anonymous)"
        self.operations.append(name)
        answers: Mapping[str, Callable[[Json], Json]] = {
            "Viewer": self._viewer,
            "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
            "RunResumeStatus": self._resume_status,
            "UpsertBucket": self._upsert_run,
            "CreateRunFiles": self._create_files,
            "MarkRunFilesUploaded": lambda _: {"markRunFilesUploaded": {"success": True}},
            "XXHashDigestsEnabled": lambda _: {"entity": {"xxhashDigestsEnabled": False}},
            "ClientIDMapping": lambda _: {"clientIDMapping": None},
            "CreateArtifact": self._create_artifact,
            "CreateArtifactManifest": lambda given: self._manifest("createArtifactManifest", given["artifactID"]),
            "UpdateArtifactManifest": lambda given: self._manifest("updateArtifactManifest", given["artifactManifestID"]),
            "CreateArtifactFiles": self._create_artifact_files,
            "CommitArtifact": lambda given: {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "0" * 32}}},
            "RunStoppedStatus": lambda _: {"project": {"run": {"stopped": False}}},
        }  # fmt: skip
        return answers[name](variables)

    def _viewer(self, _: Json) -> Json:
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}}

    def _resume_status(self, given: Json) -> Json:
        run = self.runs.get(given["name"])
        bucket = None
        if run is not None:
            tail = [json.dumps(row) for row in run.rows()[-1:]]
            bucket = {
                "id": given["name"], "name": given["name"], "displayName": run.fields.get("displayName"), "logLineCount": 0,
                "historyLineCount": len(run.history), "eventsLineCount": 0, "historyTail": json.dumps(tail), "eventsTail": "[]",
                "summaryMetrics": json.dumps(run.summary), "config": json.dumps(run.config), "tags": [], "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }  # fmt: skip
        return {"model": {"id": "1", "name": given["project"], "entity": {"id": "1", "name": ENTITY}, "bucket": bucket}}

    def _upsert_run(self, given: Json) -> Json:
        is_new = given["name"] not in self.runs
        run = self.runs.setdefault(given["name"], RunRecord())
        run.fields.update({name: value for name, value in given.items() if value is not None})
        if given.get("config"):
            run.config = json.loads(given["config"])
        bucket = {
            "id": given["name"], "name": given["name"], "displayName": run.fields.get("displayName"), "description": None,
            "config": json.dumps(run.config), "sweepName": None, "historyLineCount": len(run.history),
            "project": {"id": "1", "name": given["project"], "entity": {"id": "1", "name": ENTITY}},
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _create_files(self, given: Json) -> Json:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _create_artifact(self, given: Json) -> Json:
        artifact = given["input"]
        self.artifacts.append(artifact)
        identity = f"artifact-{len(self.artifacts)}"
        created = {"id": identity, "state": "PENDING", "artifactSequence": {"id": identity, "latestArtifact": None}}
        return {"createArtifact": {"artifact": created}}

    def _manifest(self, mutation: str, identity: str) -> Json:
        url = f"{self.url}/storage/manifests/{identity}/wandb_manifest.json"
        return {mutation: {"artifactManifest": {"id": identity, "file": {"id": identity, "uploadUrl": url, "uploadHeaders": []}}}}

    def _create_artifact_files(self, given: Json) -> Json:
        nodes = [
            {
                "storagePath": file["name"], "uploadUrl": f"{self.url}/storage/artifacts/{file['name']}", "uploadHeaders": [],
                "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]},
            }
            for file in given["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    # --- file stream ---------------------------------------------------------------------------------------------

    def stream(self, run_id: str, body: Json) -> None:
        run = self.runs.setdefault(run_id, RunRecord())
        files = body.get("files") or {}
        if HISTORY in files:
            chunk = files[HISTORY]
            for index, line in enumerate(chunk["content"]):
                run.history[chunk["offset"] + index] = json.loads(line)
        if SUMMARY in files:
            run.summary = json.loads(files[SUMMARY]["content"][-1])
        if body.get("complete"):
            run.exit_codes.append(body.get("exitcode", 0))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: WandbServer

    def do_POST(self) -> None:
        body = self._read()
        store = self.store
        with store.lock:
            if self.path == "/graphql":
                asked = json.loads(body)
                try:
                    self._reply({"data": store.answer(asked["query"], asked.get("variables") or {})})
                except KeyError as error:
                    self._reply({"errors": [{"message": f"the loopback server does not know {error}"}]})
            elif match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                store.stream(match[1], json.loads(body))
                self._reply({"exitcode": None, "limits": {}})
            else:
                self._reply({"error": self.path}, status=404)

    def do_PUT(self) -> None:
        body = self._read()
        with self.store.lock:
            self.store.uploads[self.path] = body
        self._reply({})

    def do_GET(self) -> None:
        self._read()
        self._reply({"error": self.path}, status=404)

    def _read(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = DECODERS[self.headers.get("Content-Encoding", "")](raw)
        with self.store.lock:
            self.store.received.append(f"{self.requestline}\n{self.headers}".encode() + body)
        return body

    def _reply(self, answer: Json, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test's output is its own."""


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: W&B's client leaves its connections open, and resets them when it ends."""


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server on a free port of 127.0.0.1, until the block ends."""
    store = WandbServer()
    http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    store.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


# --- servers that are dead, slow or hostile ----------------------------------------------------------------------


@contextmanager
def refusing() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextmanager
def answering(answer: bytes | None, scheme: str = "http") -> Iterator[str]:
    """A server that says the same to whatever comes, or, with None, takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        taken: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    taken.append(listening.accept()[0])
                except OSError:
                    return
                if answer is not None:
                    threading.Thread(target=reply, args=(taken[-1],), daemon=True).start()

        def reply(connection: socket.socket) -> None:
            try:
                while connection.recv(65536):
                    connection.sendall(answer or b"")
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        yield f"{scheme}://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            connection.close()


HOSTILE: Mapping[str, Callable[[], AbstractContextManager[str]]] = {
    "refuses connections": refusing,
    "never answers": lambda: answering(None),
    "answers 500": lambda: answering(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops"),
    "speaks garbage for TLS": lambda: answering(b"\x16\x03\x01 no certificate here \xff" * 9, "https"),
}
