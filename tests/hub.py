"""A small model hub on this machine, spoken to by the real client library: commits of models and data sets."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Hub:
    """Repositories as lists of commits, each a folder; the last is the present one.

    `asked` lists all requests, `given` the files that were given whole.
    """

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        self.repos: dict[str, list[tuple[str, Path]]] = {}
        self.branches: dict[str, str] = {}  # a branch and the commit that it is at
        self.asked: list[str] = []
        self.given: list[str] = []
        hub = self

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815  # the library's name

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.cache = cache
        monkeypatch.setattr(constants, "ENDPOINT", self.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def put(self, name: str, folder: Path, kind: str = "models") -> str:
        """Add a commit and return its hash."""
        commits = self.repos.setdefault(f"{kind}/{name}", [])
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits.append((commit, folder))
        return commit

    def close(self) -> None:
        """Be out of reach from now on."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer as the hub does: facts of a revision, its list of files, or a file."""
        from urllib.parse import unquote

        path = unquote(request.path.partition("?")[0])
        for branch, commit in self.branches.items():
            path = path.replace(f"/{branch}", f"/{commit}")
        self.asked.append(path)
        kind, _, rest = (
            path.removeprefix("/api/").partition("/") if path.startswith("/api/") else ("models", "", path[1:])
        )
        name = next((key for key in self.repos if f"{kind}/{rest}/".startswith(f"{key}/")), None)
        if name is None:
            self._refuse(request, "RepoNotFound")
            return
        words = f"{kind}/{rest}".removeprefix(name).strip("/").split("/")
        verb, revision, inner = (*words, "", "", "")[0], (*words, "", "")[1] or "main", "/".join(words[2:])
        commits = self.repos[name]
        found = commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)
        if found is None:
            self._refuse(request, "RevisionNotFound")
        elif verb == "resolve":
            self._file(request, found, inner)
        else:
            self._facts(request, found, name.partition("/")[2], tree=verb == "tree")

    def _facts(self, request: BaseHTTPRequestHandler, found: tuple[str, Path], name: str, *, tree: bool) -> None:
        commit, folder = found
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        rows = [
            {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _etag(f)}
            for f in files
        ]
        siblings = [{"rfilename": row["path"]} for row in rows]
        facts = rows if tree else {"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        self._send(request, 200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def _file(self, request: BaseHTTPRequestHandler, found: tuple[str, Path], inner: str) -> None:
        file = found[1] / inner
        if not file.is_file():
            self._refuse(request, "EntryNotFound")
            return
        body, headers = file.read_bytes(), {"X-Repo-Commit": found[0], "ETag": f'"{_etag(file)}"'}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range") or ""):
            first, last = (int(end) for end in asked.groups())
            part = body[first : last + 1]
            given = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(body)}"}
            self._send(request, 206, part, headers | given)
            return
        if request.command == "GET":
            self.given.append(inner)
        self._send(request, 200, body, headers)

    def _refuse(self, request: BaseHTTPRequestHandler, code: str) -> None:
        self._send(request, 404, b"{}", {"X-Error-Code": code})

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def nested(population: Path, root: Path) -> Path:
    """Two experts in the layout of the public checkpoints."""
    for task, name in (("cola", "parity"), ("rte", "loop")):
        shutil.copytree(population / name, root / task / "vit_lr1e-05")
        (root / task / "vit_lr1e-05" / "mergectl.json").unlink()
    return root
