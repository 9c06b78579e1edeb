"""A hub on 127.0.0.1: what huggingface_hub asks of one, for a repository of files on disk."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class HubStub:
    """Serves `files` (name -> bytes) as repository `repo_id` in every revision of COMMITS. `paths`: what was asked for."""

    def __init__(self, repo_id: str, files: dict[str, bytes]) -> None:
        self.repo_id = repo_id
        self.files = files
        self.paths: list[str] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, *, with_body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                stub.paths.append(path)
                status, headers, body = stub.answer(path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        api, resolve = f"/api/models/{self.repo_id}", f"/{self.repo_id}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            return self._json(path.removeprefix(api).removeprefix("/revision/") or "main", self._info)
        if path.startswith(f"{api}/tree/"):
            return self._json(path.removeprefix(f"{api}/tree/"), self._tree)
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            commit = COMMITS.get(revision, revision)
            if commit in COMMITS.values() and name in self.files:
                etag = hashlib.sha256(self.files[name]).hexdigest()
                return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, self.files[name]
        if path.endswith("/gated"):
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}, b""
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""

    def _json(self, revision: str, make: object) -> tuple[int, dict[str, str], bytes]:
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}, b""
        return 200, {"Content-Type": "application/json"}, json.dumps(make(commit)).encode()  # type: ignore[operator]

    def _info(self, commit: str) -> object:
        return {"id": self.repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in self.files], "tags": []}

    def _tree(self, commit: str) -> object:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in self.files.items()
        ]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
