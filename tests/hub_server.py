"""A Hub on the loopback interface, as much of it as the real client needs: repositories, LFS, gates, and failures on demand."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

OWNER_TOKEN, READER_TOKEN, STRANGER_TOKEN = "hf_owner", "hf_reader", "hf_stranger"  # a stranger may not pass a gate


@dataclasses.dataclass
class Failure:
    """What requests that match are answered with, instead of what they asked for.

    Args:
        request: Pattern of method and path, such as `GET .*safetensors`.
        status: Answered, unless one of the others is set.
        headers: Sent with the status.
        cut_at: The body ends after so many bytes, and so does the connection.
        hang: No answer until the server stops.
        delay: Seconds before an answer that is as it should be.
        content: The file, instead of what its digest announces.
        times: How many requests fail.
    """

    request: str
    status: int = 500
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    cut_at: int | None = None
    hang: bool = False
    delay: float = 0.0
    content: bytes | None = None
    times: int = 1_000_000


class Repository:
    """Commits, each a dict of files, and the branches and tags that lead to them."""

    def __init__(self, gated: bool = False, private: bool = False):
        self.gated, self.private = gated, private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        commit = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode() + b"".join(files.values())).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]

    @property
    def tags(self) -> list[str]:
        """The searchable tags, from the card's metadata as on the real Hub."""
        front_matter = re.match(rb"---\n(.*?)\n---", self.files.get("README.md", b""), re.DOTALL)
        metadata = yaml.safe_load(front_matter[1]) if front_matter else {}
        return [*metadata.get("tags", []), metadata.get("library_name", ""), f"base_model:{metadata.get('base_model')}"]


class HubServer:
    """`with HubServer() as hub:` serves `hub.repositories` at `hub.endpoint`; `hub.log` has every request."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.log: list[tuple[str, dict[str, str]]] = []
        self.stopped = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def create(self, repo_id: str, files: dict[str, bytes], **options) -> Repository:
        self.repositories[repo_id] = Repository(**options)
        self.repositories[repo_id].commit(files)
        return self.repositories[repo_id]

    @contextlib.contextmanager
    def failing(self, request: str, **options) -> Iterator[None]:
        """Requests that match fail while the body runs."""
        failure = Failure(request, **options)
        self.failures.append(failure)
        try:
            yield
        finally:
            self.failures.remove(failure)

    def requests(self, pattern: str) -> list[dict[str, str]]:
        """The headers of the requests so far that match."""
        return [headers for request, headers in self.log if re.fullmatch(pattern, request)]


ROUTES: list[tuple[str, str]] = [  # "METHOD path" of a request -> method of _Handler
    (r"GET /api/whoami-v2", "whoami"),
    (r"GET /api/models", "search"),
    (r"POST /api/validate-yaml", "validate_card"),
    (r"POST /api/repos/create", "create"),
    (r"GET /api/models/(?P<repo_id>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", "info"),
    (r"POST /api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
    (r"POST /(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /_lfs/(?P<digest>\w+)", "lfs_upload"),
    (r"POST /_lfs/verify", "lfs_verify"),
    (r"POST /api/models/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
    (r"(GET|HEAD) /(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".png"))


def problems_of(metadata) -> list[str]:
    """What the Hub's own schema for a card's metadata finds wrong, for the keys that cards here have."""
    if not isinstance(metadata, dict):
        return ["no metadata"]
    problems = []
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(metadata.get("base_model", "a/b"))):
        problems.append('"base_model" must be a repository id')
    for key in ("license", "library_name", "pipeline_tag"):
        if not isinstance(metadata.get(key, ""), str):
            problems.append(f'"{key}" must be a string')
    if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
        problems.append('"tags" must be strings')
    try:
        for model in metadata.get("model-index", []):
            strings = [model["name"]]
            for result in model["results"]:
                strings += [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
                strings += [metric["type"] for metric in result["metrics"]]
                if not all(isinstance(metric["value"], int | float) for metric in result["metrics"]):
                    problems.append('"model-index" must have numbers as values')
            if not strings[1:] or not all(isinstance(word, str) and word for word in strings):
                problems.append('"model-index" must have names')
    except (KeyError, TypeError) as error:
        problems.append(f'"model-index" lacks {error}')
    return problems


class _Refused(Exception):
    """Answer with a status and the Hub's error code."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        """Nothing on standard error."""

    def handle_request(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(url.query)
        self.request_body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.failure = None
        request = f"{self.command} {urllib.parse.unquote(url.path)}"
        self.hub.log.append((request, dict(self.headers)))
        for failure in self.hub.failures:
            if failure.times and re.fullmatch(failure.request, request):
                failure.times -= 1
                self.failure = failure
        if self.failure and self.failure.hang:
            self.hub.stopped.wait()
            self.close_connection = True
            return
        if self.failure and self.failure.delay:
            self.hub.stopped.wait(self.failure.delay)
            self.failure = None
        if self.failure and self.failure.cut_at is None and self.failure.content is None:
            self.answer({"error": "as told"}, self.failure.status, self.failure.headers)
            return
        for pattern, name in ROUTES:
            if match := re.fullmatch(pattern, request):
                try:
                    getattr(self, name)(**match.groupdict())
                except _Refused as refused:
                    status, code = refused.args
                    self.answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})
                return
        self.answer({"error": f"no route {request}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, body, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failure and self.failure.cut_at is not None:
            content = content[: self.failure.cut_at]
            self.close_connection = True
        self.wfile.write(content)

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def repository(self, repo_id: str) -> Repository:
        if self.token not in ("", OWNER_TOKEN, READER_TOKEN, STRANGER_TOKEN):
            self.answer_unauthorized()
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token != OWNER_TOKEN):
            raise _Refused(404 if self.token else 401, "RepoNotFound")
        return repository

    def answer_unauthorized(self) -> None:
        raise _Refused(401, "Unauthorized")

    def commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return commit

    # One method a route

    def whoami(self) -> None:
        if not self.token:
            self.answer_unauthorized()
        self.answer({"type": "user", "name": "owner", "orgs": [], "auth": {"type": "access_token"}})

    def search(self) -> None:
        wanted = set(self.query.get("filter", []))
        found = [name for name, repository in self.hub.repositories.items() if wanted <= set(repository.tags)]
        self.answer([{"id": name, "modelId": name, "tags": self.hub.repositories[name].tags} for name in found])

    def validate_card(self) -> None:
        content = json.loads(self.request_body)["content"]
        front_matter = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(front_matter[1]) if front_matter else None
        errors = [{"message": problem} for problem in problems_of(metadata)]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self) -> None:
        if self.token != OWNER_TOKEN:
            raise _Refused(403 if self.token else 401, "Forbidden")
        wanted = json.loads(self.request_body)
        repo_id = f"{wanted.get('organization') or 'owner'}/{wanted['name']}"
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))  # of the new client, of the old
        exists = repo_id in self.hub.repositories
        if not exists:
            self.hub.create(repo_id, {".gitattributes": b""}, private=private)
        self.answer({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}, 409 if exists else 200)

    def info(self, repo_id: str, revision: str | None) -> None:
        repository = self.repository(repo_id)
        commit = self.commit_of(repository, revision or "main")
        siblings = [{"rfilename": name} for name in repository.commits[commit]]
        self.answer(
            {"_id": "1", "id": repo_id, "modelId": repo_id, "sha": commit, "tags": repository.tags, "siblings": siblings}
        )

    def preupload(self, repo_id: str, revision: str) -> None:
        self.commit_of(self.repository(repo_id), revision)
        if self.token != OWNER_TOKEN:
            raise _Refused(403 if self.token else 401, "Forbidden")
        names = [file["path"] for file in json.loads(self.request_body)["files"]]
        modes = ["lfs" if is_large(name) else "regular" for name in names]
        files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in zip(names, modes, strict=True)]
        self.answer({"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        objects = json.loads(self.request_body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.uploads:
                actions = {"upload": f"/_lfs/{entry['oid']}", "verify": "/_lfs/verify"}
                entry["actions"] = {name: {"href": self.hub.endpoint + path} for name, path in actions.items()}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, digest: str) -> None:
        if hashlib.sha256(self.request_body).hexdigest() != digest:
            raise _Refused(400, "BadDigest")
        self.hub.uploads[digest] = self.request_body
        self.answer({})

    def lfs_verify(self) -> None:
        self.answer({})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        files = dict(repository.commits[self.commit_of(repository, revision)])
        for entry in map(json.loads, self.request_body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = repository.commit(files, revision)
        self.answer({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}"})

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.repository(repo_id)
        if repository.gated and self.token not in (OWNER_TOKEN, READER_TOKEN):
            raise _Refused(403 if self.token else 401, "GatedRepo")
        commit = self.commit_of(repository, revision)
        if name not in repository.commits[commit]:
            raise _Refused(404, "EntryNotFound")
        content = repository.commits[commit][name]
        digest = hashlib.sha256(content) if is_large(name) else hashlib.sha1(b"blob %d\0" % len(content) + content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest.hexdigest()}"', "Accept-Ranges": "bytes"}
        if self.failure and self.failure.content is not None:
            content = self.failure.content
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and self.command == "GET":
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.answer(content[first:], 206, headers)
        else:
            self.answer(content, 200, headers)
