"""A stand-in for the Hub's HTTP API, for the real client: repositories in memory, served on 127.0.0.1.

It answers what huggingface_hub calls to make a model repository, upload a folder (regular files and LFS) and read it.
It does not speak Xet, the storage protocol that the Hub prefers: clients need `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Commit:
    files: dict[str, bytes]
    title: str
    parent: str | None = None

    @property
    def oid(self) -> str:
        content = [self.title, self.parent, *(f"{path} {_sha256(data)}" for path, data in sorted(self.files.items()))]
        return hashlib.sha1(repr(content).encode()).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/N -> commit

    def add(self, ref, commit):
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid

    def files(self, revision="main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)].files


class Answer(Exception):
    """What a request gets; `code` is the Hub's name of an error."""

    def __init__(self, status, content=None, code=None, **headers):
        self.status = status
        self.body = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if code is not None:
            self.headers |= {"X-Error-Code": code, "X-Error-Message": content["error"]}


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        url (`str`): The endpoint.
        tokens (`dict`): The user of each token.
        repos (`dict`): Repositories by id.
        requests (`list`): Method and path of each request.
        unknown (`list`): Those that the stand-in knows nothing of.
        answers (`dict`): Regular expression of a path -> `Answer` that it gets instead.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = {"hf_user": "user", "hf_other": "other"}
        self.repos: dict[str, Repo] = {}
        self.requests, self.unknown, self.answers = [], [], {}
        self.objects = {}  # LFS: sha256 -> content
        self.lock = threading.Lock()

    def environment(self, home, token="hf_user") -> dict[str, str]:
        """Of a process that takes this for the Hub; `home` is a folder for its caches."""
        return os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_TOKEN": token,
        }


@contextmanager
def hub_server():
    """Runs a `HubServer` in a thread."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_request(self):
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        with self.server.lock:
            self.server.requests.append((self.command, url.path))
            try:
                self._route(url.path)
            except Answer as answer:
                self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_request

    def _read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer):
        self.send_response(answer.status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": len(answer.body)} | answer.headers
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _route(self, path):
        for pattern, answer in self.server.answers.items():
            if re.search(pattern, path):
                raise answer
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                raise method(self, *(unquote(group) for group in match.groups()))
        self.server.unknown.append(f"{self.command} {path}")
        raise Answer(501, {"error": "the stand-in knows nothing of this"})

    # Who asks, and for what.

    @property
    def _user(self):
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.server.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            error = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": error}, X_Error_Message=error)
        return user

    def _json(self):
        return json.loads(self.body)

    def _repo(self, repo_id, write=False) -> Repo:
        user, owner = self._user, repo_id.split("/")[0]
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and user != owner):
            raise Answer(404 if user else 401, {"error": "Repository not found"}, code="RepoNotFound")
        if write and user is None:
            raise Answer(401, {"error": "Invalid username or password."})
        if write and user != owner:
            error = f"you don't have the right to write to {repo_id}"
            raise Answer(403, {"error": error}, X_Error_Message=error)
        return repo

    def _commit(self, repo, revision) -> Commit:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, code="RevisionNotFound")
        return repo.commits[oid]

    # Making repositories and branches.

    def create(self):
        asked, user = self._json(), self._user
        owner = asked["organization"] or user
        repo_id = f"{owner}/{asked['name']}"
        if user is None:
            raise Answer(401, {"error": "Invalid username or password."})
        if user != owner:
            error = f"You don't have the rights to create a model under the namespace {owner!r}"
            raise Answer(403, {"error": error}, X_Error_Message=error)
        content = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repos:
            return Answer(409, content | {"error": "You already created this model repo"})
        repo = self.server.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        repo.add("main", Commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit"))
        return Answer(200, content)

    def branch(self, repo_id, name):
        repo = self._repo(repo_id, write=True)
        if name in repo.refs:
            return Answer(409, {"error": f"Reference already exists: {name}"})
        repo.refs[name] = self._commit(repo, self._json().get("startingPoint", "main")).oid
        return Answer(201)

    # Uploading.

    def validate_yaml(self):
        return Answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo_id, revision):
        repo = self._repo(repo_id, write="create_pr" not in self.query)
        old = self._commit(repo, revision).files
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _oid(file["path"], old[file["path"]]) if file["path"] in old else None,
            }
            for file in self._json()["files"]
        ]
        return Answer(200, {"files": files})

    def lfs_batch(self, repo_id):
        self._repo(repo_id)
        asked = self._json()
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256", asked
        objects = []
        for item in asked["objects"]:
            href = f"{self.server.url}/lfs/{item['oid']}"
            new = {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            objects.append(item | ({} if item["oid"] in self.server.objects else new))
        return Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if _sha256(self.body) != oid:
            raise Answer(400, {"error": f"the content is not that of {oid}"})
        self.server.objects[oid] = self.body
        return Answer(200)

    def lfs_verify(self, oid):
        asked = self._json()
        whole = asked["oid"] == oid and len(self.server.objects.get(oid, b"")) == asked["size"]
        return Answer(200) if whole else Answer(404, {"error": "not uploaded"})

    def commit(self, repo_id, revision):
        proposed = "create_pr" in self.query
        repo = self._repo(repo_id, write=not proposed)
        parent = self._commit(repo, revision)
        files, title = dict(parent.files), None
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Answer(501, {"error": f"the stand-in cannot {item['key']}"})
        ref = f"refs/pr/{sum(ref.startswith('refs/pr/') for ref in repo.refs) + 1}" if proposed else revision
        commit = Commit(files, title, parent.oid)
        repo.add(ref, commit)
        url = f"{self.server.url}/{repo_id}"
        content = {"success": True, "commitUrl": f"{url}/commit/{commit.oid}", "commitOid": commit.oid}
        if proposed:
            content["pullRequestUrl"] = f"{url}/discussions/{ref.removeprefix('refs/pr/')}"
        return Answer(200, content)

    # Reading.

    def agent_harnesses(self):
        return Answer(200, {"standardEnvVars": [], "harnesses": {}})

    def info(self, repo_id, revision="main"):
        repo = self._repo(repo_id)
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return Answer(200, {"id": repo_id, "sha": commit.oid, "private": repo.private, "siblings": siblings})

    def tree(self, repo_id, revision, folder=""):
        files = self._commit(self._repo(repo_id), revision).files
        entries = []
        for path, data in sorted(files.items()):
            if path.startswith(folder and f"{folder}/"):
                lfs = {"lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 134}} if _is_lfs(path) else {}
                entries.append({"type": "file", "path": path, "size": len(data), "oid": _git_oid(data), **lfs})
        if folder and not entries:
            raise Answer(404, {"error": f"{folder} does not exist"}, code="EntryNotFound")
        if "recursive" not in self.query:
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(folder and f"{folder}/")]
        return Answer(200, entries)

    def resolve(self, repo_id, revision, path):
        commit = self._commit(self._repo(repo_id), revision)
        if path not in commit.files:
            raise Answer(404, {"error": "Entry not found"}, code="EntryNotFound", X_Repo_Commit=commit.oid)
        data = commit.files[path]
        return Answer(200, data, X_Repo_Commit=commit.oid, ETag=f'"{_oid(path, data)}"')


REPO, REVISION = r"([^/]+/[^/]+)", "([^/]+)"
ROUTES = [
    ("GET /api/agent-harnesses", Handler.agent_harnesses),
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate_yaml),
    (f"POST /api/models/{REPO}/branch/{REVISION}", Handler.branch),
    (f"POST /api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    (f"POST /api/models/{REPO}/commit/{REVISION}", Handler.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT /lfs/([0-9a-f]{64})", Handler.lfs_put),
    ("POST /lfs/([0-9a-f]{64})/verify", Handler.lfs_verify),
    (f"GET /api/models/{REPO}", Handler.info),
    (f"GET /api/models/{REPO}/revision/{REVISION}", Handler.info),
    (f"GET /api/models/{REPO}/tree/{REVISION}", Handler.tree),
    (f"GET /api/models/{REPO}/tree/{REVISION}/(.+)", Handler.tree),
    (f"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(.+)", Handler.resolve),
]


def _is_lfs(path):
    return path.endswith(".safetensors")


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(path, data):
    return _sha256(data) if _is_lfs(path) else _git_oid(data)
