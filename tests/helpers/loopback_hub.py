"""A Hub on 127.0.0.1: as much of its HTTP API as `huggingface_hub`, `kernels` and `transformers` use.

    with LoopbackHub() as hub:
        process.run(..., **hub.environment(cache_dir))

Repositories live in memory: a branch is the name of a commit, a commit is a dictionary of files.
Writes go through the same endpoints as on the real Hub (create, branch, preupload, LFS, commit) and
need a token. `hub.fail(...)` makes requests go wrong.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from helpers import ROOT, process

TOKEN = "hf_loopback"


@dataclass
class Repository:
    branches: dict = field(default_factory=dict)  # name -> commit id
    commits: dict = field(default_factory=dict)  # commit id -> {path: content}

    def commit(self, branch, files):
        names = sorted(
            (path, hashlib.sha256(content).hexdigest()) for path, content in files.items()
        )
        parent = self.branches.get(branch, "")
        commit_id = hashlib.sha1(json.dumps([parent, names]).encode()).hexdigest()
        self.commits[commit_id] = files
        self.branches[branch] = commit_id
        return commit_id

    def resolve(self, revision):
        """A branch's or a commit's id, or None."""
        commit_id = self.branches.get(revision, revision)
        return commit_id if commit_id in self.commits else None


@dataclass
class Fault:
    """Requests whose path contains `path` go wrong, `times` times."""

    path: str
    kind: (
        object  # an HTTP status, "cut" (mid-body) or "truncate" (fewer bytes than promised before)
    )
    times: int


class LoopbackHub:
    def __init__(self):
        self.repositories = {}  # (type, id) -> Repository
        self.trusted = {"kernels-community"}
        self.lfs = {}  # sha256 -> content
        self.faults = []
        self.requests = []  # "METHOD path", for tests to look at
        self.lock = threading.Lock()
        self.barrier = None  # commits wait here for each other, once

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """The variables that send the real clients here, with their caches under `home`.

        Not among them: HF_HUB_DISABLE_TELEMETRY, with which kernels 0.17.2 sends a user agent that
        ends in a space and huggingface_hub 2.4.0 refuses to.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",  # Xet is another protocol; without it files go over LFS
        }

    def repository(self, repo_id, repo_type="kernel"):
        return self.repositories.setdefault((repo_type, repo_id), Repository())

    def add_files(self, repo_id, files, repo_type="kernel", branch="main"):
        """Put files into a repository without going over HTTP."""
        repository = self.repository(repo_id, repo_type)
        current = repository.commits.get(repository.branches.get(branch), {})
        return repository.commit(branch, current | files)

    def fail(self, path, kind, times=10**9):
        self.faults.append(Fault(path, kind, times))

    def take_fault(self, path):
        with self.lock:
            for fault in self.faults:
                if fault.path in path and fault.times > 0:
                    fault.times -= 1
                    return fault.kind
        return None


def publish(hub, home, root=ROOT, fails=False):
    """Run a checkout's tools/publish.py against the hub. Returns its output."""
    environment = {"LOCAL_KERNELS": None} | hub.environment(home)
    result = process.python(root / "tools" / "publish.py", fails=fails, **environment)
    return result.stdout + result.stderr


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.handle_request("HEAD")

    def do_GET(self):
        self.handle_request("GET")

    def do_POST(self):
        self.handle_request("POST")

    def do_PUT(self):
        self.handle_request("PUT")

    def log_message(self, *_):
        pass

    def handle_request(self, method):
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{method} {unquote(url.path)}")
        self.fault = self.hub.take_fault(unquote(url.path))
        if isinstance(self.fault, int):
            return self.error(self.fault, "made to fail")
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if method == "POST" and parts[-1] != "batch" and not authorized:
            return self.error(401, "no token")
        if parts[0] == "api":
            return self.api(method, parts[1:])
        if parts[0] == "lfs" and method == "PUT":
            self.hub.lfs[parts[1]] = self.body
            return self.reply(b"")
        if parts[-1] == "batch":
            return self.lfs_batch()
        repo_type = "model"
        if parts[0] == "kernels":
            repo_type, parts = "kernel", parts[1:]
        if len(parts) > 4 and parts[2] == "resolve":
            return self.resolve(repo_type, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.error(404, "no such page")

    # ----- replies --------------------------------------------------------------------------------

    def reply(self, content, status=200, headers=(), content_type="application/json"):
        promised = len(content)
        if self.fault == "truncate":
            content, promised = content[: len(content) // 2], len(content) // 2
        if self.fault == "cut":
            content = content[: len(content) // 2]
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(promised))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        if self.fault == "cut":
            self.close_connection = True

    def reply_json(self, data, status=200):
        self.reply(json.dumps(data).encode(), status)

    def error(self, status, message, code=None):
        headers = [("X-Error-Message", message)]
        if code is not None:
            headers.append(("X-Error-Code", code))
        self.reply(json.dumps({"error": message}).encode(), status, headers)

    # ----- files ----------------------------------------------------------------------------------

    def resolve(self, repo_type, repo_id, revision, path):
        repository = self.hub.repositories.get((repo_type, repo_id))
        if repository is None:
            return self.error(404, "no such repository", "RepoNotFound")
        commit_id = repository.resolve(revision)
        if commit_id is None:
            return self.error(404, "no such revision", "RevisionNotFound")
        content = repository.commits[commit_id].get(path)
        if content is None:
            return self.error(404, "no such file", "EntryNotFound")
        if self.command == "HEAD":
            self.fault = None  # faults of the body come with the GET
        headers = [
            ("X-Repo-Commit", commit_id),
            ("ETag", f'"{hashlib.sha256(content).hexdigest()}"'),
        ]
        self.reply(content, headers=headers, content_type="application/octet-stream")

    def lfs_batch(self):
        objects = []
        for item in json.loads(self.body)["objects"]:
            if item["oid"] not in self.hub.lfs:
                href = f"{self.hub.url}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href}}
            objects.append(item)
        self.reply_json({"transfer": "basic", "objects": objects})

    # ----- the API --------------------------------------------------------------------------------

    def api(self, method, parts):
        if parts == ["whoami-v2"]:
            return self.reply_json({"type": "user", "name": "tester", "orgs": []})
        if parts[0] == "organizations":
            trusted = parts[1] in self.hub.trusted
            return self.reply_json({"name": parts[1], "trustedKernelPublisher": trusted})
        if parts == ["validate-yaml"]:
            return self.reply_json({"errors": [], "warnings": []})
        if parts == ["repos", "create"]:
            data = json.loads(self.body)
            repo_id = "/".join(filter(None, [data.get("organization"), data["name"]]))
            url = {"url": f"{self.hub.url}/kernels/{repo_id}"}
            key = (data.get("type", "model"), repo_id)
            if key in self.hub.repositories:
                return self.reply_json(url | {"error": "exists already"}, 409)
            self.hub.repository(repo_id, key[0]).commit("main", {})
            return self.reply_json(url)
        repo_type, repo_id, action = parts[0][:-1], "/".join(parts[1:3]), parts[3:]
        repository = self.hub.repositories.get((repo_type, repo_id))
        if repository is None:
            return self.error(404, "no such repository", "RepoNotFound")
        if not action:
            action = ["revision", "main"]
        if action[0] == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_id}
                for name, commit_id in repository.branches.items()
            ]
            return self.reply_json({"branches": branches, "converts": [], "tags": []})
        if action[0] == "branch":
            if action[1] in repository.branches:
                return self.error(409, "exists already")
            start = json.loads(self.body or b"{}").get("startingPoint") or "main"
            repository.branches[action[1]] = repository.branches[start]
            return self.reply_json({})
        commit_id = repository.resolve(action[1])
        if commit_id is None:
            return self.error(404, "no such revision", "RevisionNotFound")
        files = repository.commits[commit_id]
        if action[0] == "revision":
            siblings = [{"rfilename": path} for path in files]
            info = {"id": repo_id, "_id": repo_id, "modelId": repo_id, "sha": commit_id}
            return self.reply_json(info | {"siblings": siblings, "private": False, "tags": []})
        if action[0] == "tree":
            entries = tree(files, action[2] if len(action) > 2 else "", self.query)
            if entries is None:
                return self.error(404, "no such folder", "EntryNotFound")
            return self.reply_json(entries)
        if action[0] == "preupload":
            # Binaries go over LFS, as .gitattributes has it on the Hub.
            asked = json.loads(self.body)["files"]
            answer = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".so") else "regular",
                    "shouldIgnore": False,
                    "oid": oid(files[item["path"]]) if item["path"] in files else None,
                }
                for item in asked
            ]
            return self.reply_json({"files": answer})
        if action[0] == "commit":
            operations = [json.loads(line) for line in self.body.splitlines()]
            commit_id = self.commit(repository, action[1], operations)
            if commit_id is None:
                return self.error(412, "A commit has happened since. Please refresh and try again.")
            url = f"{self.hub.url}/kernels/{repo_id}/commit/{commit_id}"
            return self.reply_json({"commitUrl": url, "commitOid": commit_id, "success": True})
        self.error(404, f"no such endpoint: {action[0]}")

    def commit(self, repository, branch, operations):
        """The new commit's id, or None if the branch isn't where the commit says it is."""
        barrier = self.hub.barrier
        if barrier is not None:
            barrier.wait(timeout=60)
            self.hub.barrier = None
        with self.hub.lock:
            parents = [o["value"].get("parentCommit") for o in operations if o["key"] == "header"]
            if parents[0] not in (None, repository.branches[branch]):
                return None
            files = dict(repository.commits[repository.branches[branch]])
            for operation in operations:
                apply(operation, files, self.hub.lfs)
            return repository.commit(branch, files)


def oid(content):
    """git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree(files, folder, query):
    """The entries of a folder, as the API lists them, or None if there is no such folder."""
    entries = {}
    for path, content in files.items():
        pure = PurePosixPath(path)
        if folder and not pure.is_relative_to(folder):
            continue
        below = pure.relative_to(folder).parts
        for depth in range(1, len(below)):
            name = str(PurePosixPath(folder, *below[:depth]))
            if depth == 1 or query.get("recursive", "").lower() == "true":
                entries[name] = {"type": "directory", "path": name, "oid": oid(name.encode())}
        if len(below) == 1 or query.get("recursive", "").lower() == "true":
            size = len(content)
            entries[path] = {"type": "file", "path": path, "size": size, "oid": oid(content)}
    return list(entries.values()) if entries or not folder else None


def apply(operation, files, lfs):
    """Apply one line of a commit to a dictionary of files."""
    key, value = operation["key"], operation["value"]
    if key == "file":
        files[value["path"]] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        files[value["path"]] = lfs[value["oid"]]
    elif key == "deletedFile":
        del files[value["path"]]
    elif key == "deletedFolder":
        prefix = value["path"].rstrip("/") + "/"
        for path in [path for path in files if path.startswith(prefix)]:
            del files[path]
