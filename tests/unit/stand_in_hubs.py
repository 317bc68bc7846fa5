"""A server on this machine that speaks enough of the protocols of both hubs.

Downloads of one model; and accounts, repositories, models and uploads that are kept in
the server's memory, as far as pushing needs them. What is refused, and where a
connection breaks, is set on the server.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import re
import socket
import threading
import urllib.parse

import gemma_keras

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = {
    "config.json": b'{"model_type": "gemma"}',
    "tokenizer.model": b"not a tokenizer",
    "tokenizer.json": b"large and not needed",
    "model.safetensors": b"x" * 5000,
    "README.md": b"not needed",
    "gemma-2b.gguf": b"GGUF not needed",
}
# Who may write where, and with what.
ME, OURS = "me", "our-lab"
TOKEN = "hf_right"
WRONG_TOKEN = "Invalid credentials in Authorization header"
KAGGLE_USER, KAGGLE_KEY = ME, "right"
# What Hugging Face stores apart from git.
LARGE = (".safetensors", ".h5", ".gguf", ".model", ".spm")


@dataclasses.dataclass
class Repository:
    """One of Hugging Face's."""

    private: bool
    # Name to contents and the title of the last commit that changed it.
    files: dict = dataclasses.field(default_factory=dict)
    commits: list = dataclasses.field(default_factory=lambda: ["initial commit"])

    @property
    def sha(self):
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclasses.dataclass
class KaggleModel:
    """One of Kaggle's, with its variations."""

    title: str
    description: str
    private: bool
    # (framework, variation) to the files of each version, name to contents.
    versions: dict = dataclasses.field(default_factory=dict)
    bodies: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Upload:
    """One that can be resumed."""

    name: str
    size: int
    data: bytearray = dataclasses.field(default_factory=bytearray)


class Hub(http.server.BaseHTTPRequestHandler):
    """One connection."""

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, urllib.parse.unquote(self.path.split("?")[0])
        server.requests.append(f"{self.command} {path}")
        if server.status != 200:
            return self.refuse()
        if path == "/api/whoami-v2":
            return self.whoami()
        found = re.match(r"(?:/api/models)?/([^/]+/[^/]+)", path)
        if found and found[1] in server.repositories:
            return self.get_repository(found[1], path)
        api = re.fullmatch(
            r"/api/models/google/gemma-2b(?:/(revision|tree)/(\w+))?", path
        )
        if api and api[2] not in (None, "main", COMMIT, "v1"):
            return self.refuse(404, "RevisionNotFound")
        if api and api[1] == "tree":
            return self.reply_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                    for name, data in REPOSITORY.items()
                ]
            )
        if api:
            siblings = [{"rfilename": name} for name in REPOSITORY]
            info = {"id": "google/gemma-2b", "sha": COMMIT, "siblings": siblings}
            return self.reply_json(info)
        file = re.fullmatch(r"/google/gemma-2b/resolve/\w+/(.+)", path)
        if file and file[1] in REPOSITORY:
            return self.reply(REPOSITORY[file[1]], True)
        if path.startswith("/files/"):
            return self.reply(server.kaggle_files[path.removeprefix("/files/")], True)
        return self.refuse(404, "EntryNotFound" if file else "RepoNotFound")

    def do_POST(self):
        """Hugging Face's forms, and Kaggle's remote procedure calls."""
        server, path = self.server, urllib.parse.unquote(self.path.split("?")[0])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        call = path.rsplit("/", 1)[1]
        kaggle = path.startswith("/api/v1/")
        server.requests.append(call if kaggle else f"POST {path}")
        if server.status != 200:
            return self.refuse()
        for end, status in server.refusals.items():
            if path.endswith(end):
                return self.refuse(status, message="not now")
        if kaggle:
            return getattr(self, f"kaggle_{call}", self.kaggle_download)(
                json.loads(body), call
            )
        if not self.is_me():
            return self.refuse(401, message=WRONG_TOKEN)
        if path == "/api/repos/create":
            return self.create_repository(json.loads(body))
        if path == "/api/validate-yaml":
            return self.reply_json({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if found and found[1] in server.repositories:
            answer = getattr(self, found[2])
            return answer(server.repositories[found[1]], body)
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(json.loads(body))
        if path == "/lfs/verify":
            return self.reply_json({})
        return self.refuse(404, "RepoNotFound")

    def do_PUT(self):
        """Contents of files, and Hugging Face's settings."""
        server, path = self.server, self.path
        server.requests.append(f"PUT {path}")
        if path.startswith("/lfs/"):
            data = bytearray()
            if self.receive(data):
                assert hashlib.sha256(data).hexdigest() == path.removeprefix("/lfs/")
                server.lfs[path.removeprefix("/lfs/")] = bytes(data)
                self.reply(b"")
            return None
        if path.startswith("/uploads/"):
            return self.put_upload(path.removeprefix("/uploads/"))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = re.fullmatch(r"/api/models/([^/]+/[^/]+)/settings", path)[1]
        private = body.get("private", body.get("visibility") == "private")
        server.repositories[name].private = private
        return self.reply_json({"private": private})

    # Hugging Face

    def is_me(self):
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def whoami(self):
        if not self.is_me():
            return self.refuse(401, message=WRONG_TOKEN)
        return self.reply_json({"name": ME, "type": "user", "orgs": [{"name": OURS}]})

    def get_repository(self, name, path):
        repository = self.server.repositories[name]
        if repository.private and not self.is_me():
            return self.refuse(401, "RepoNotFound")
        file = re.fullmatch(rf"/{re.escape(name)}/resolve/\w+/(.+)", path)
        if file:
            if file[1] not in repository.files:
                return self.refuse(404, "EntryNotFound")
            return self.reply(repository.files[file[1]][0], True, repository.sha)
        if "/tree/" in path:
            when = {"id": COMMIT, "date": "2026-01-01T00:00:00.000Z"}
            return self.reply_json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": COMMIT}
                    | {"lastCommit": {**when, "title": title}}
                    for path, (data, title) in repository.files.items()
                ]
            )
        siblings = [{"rfilename": path} for path in repository.files]
        return self.reply_json(
            {"id": name, "sha": repository.sha, "private": repository.private}
            | {"siblings": siblings}
        )

    def create_repository(self, body):
        owner, name = body["organization"] or ME, body["name"]
        if owner not in (ME, OURS):
            message = f'You don\'t have the rights to create a model under "{owner}"'
            return self.refuse(403, message=message)
        full = f"{owner}/{name}"
        if full in self.server.repositories:
            return self.refuse(409, message="You already created this model repo")
        private = body.get("private", body.get("visibility") == "private")
        self.server.repositories[full] = Repository(private)
        return self.reply_json({"url": f"{self.server.url}/{full}", "id": full})

    def preupload(self, repository, body):
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LARGE)
            answer = {"path": file["path"], "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if large else "regular"
            data, _ = repository.files.get(file["path"], (None, None))
            if data is not None:
                blob = b"blob %d\0" % len(data) + data
                sha = hashlib.sha256(data) if large else hashlib.sha1(blob)
                answer["oid"] = sha.hexdigest()
            answers.append(answer)
        return self.reply_json({"files": answers})

    def lfs_batch(self, body):
        objects = []
        for entry in body["objects"]:
            answer = dict(entry)
            if entry["oid"] not in self.server.lfs:
                upload = {"href": f"{self.server.url}/lfs/{entry['oid']}", "header": {}}
                verify = {"href": f"{self.server.url}/lfs/verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return self.reply_json({"transfer": "basic", "objects": objects})

    def commit(self, repository, body):
        entries = [json.loads(line) for line in body.splitlines()]
        header = entries.pop(0)["value"]
        if header.get("parentCommit", repository.sha) != repository.sha:
            return self.refuse(412, message="A commit has happened since")
        for entry in entries:
            value, title = entry["value"], header["summary"]
            if entry["key"] == "deletedFile":
                del repository.files[value["path"]]
            elif entry["key"] == "lfsFile":
                data = self.server.lfs[value["oid"]]
                repository.files[value["path"]] = data, title
            else:
                data = base64.b64decode(value["content"])
                repository.files[value["path"]] = data, title
        repository.commits.append(header["summary"])
        answer = {"success": True, "commitOid": repository.sha}
        place = f"{self.server.url}/me/tiny/commit/{repository.sha}"
        return self.reply_json({**answer, "commitUrl": place})

    # Kaggle

    def may(self, owner):
        """Whether the caller may write; answers where not."""
        said = f"{KAGGLE_USER}:{KAGGLE_KEY}".encode()
        expected = f"Basic {base64.b64encode(said).decode()}"
        if self.headers["Authorization"] != expected:
            self.refuse(401, message="Unauthenticated")
            return False
        if owner not in (ME, OURS):
            self.reply_json({"error": "Permission 'models.create' was denied"})
            return False
        return True

    def kaggle_download(self, body, call):
        server = self.server
        files = REPOSITORY
        if (body["ownerSlug"], body["modelSlug"]) in server.models:
            model = server.models[body["ownerSlug"], body["modelSlug"]]
            files = model.versions[body["framework"], body["instanceSlug"]][-1]
        elif body["instanceSlug"] != "gemma_2b_en":
            return self.refuse(404)
        if call == "GetModelInstance":
            return self.reply_json({"versionNumber": 3})
        if call == "ListModelInstanceVersionFiles":
            return self.reply_json({"files": [{"name": name} for name in files]})
        server.kaggle_files = files
        self.send_response(302)
        self.send_header("Location", f"{server.url}/files/{body['path']}")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def kaggle_GetModel(self, body, call):
        model = self.server.models.get((body["ownerSlug"], body["modelSlug"]))
        if model is None:
            return self.refuse(403, message="Permission 'models.get' was denied")
        return self.reply_json(
            {"title": model.title, "slug": body["modelSlug"]}
            | {"isPrivate": model.private, "description": model.description}
        )

    def kaggle_CreateModel(self, body, call):
        if self.may(body["ownerSlug"]):
            key = body["ownerSlug"], body["slug"]
            self.server.models[key] = KaggleModel(
                body["title"], body["description"], body["isPrivate"]
            )
            self.reply_json({"id": 1, "url": "/".join(key)})

    def kaggle_UpdateModel(self, body, call):
        if self.may(body["ownerSlug"]):
            assert body["updateMask"] == "isPrivate"
            model = self.server.models[body["ownerSlug"], body["modelSlug"]]
            # What is false is left out of the message.
            model.private = body.get("isPrivate", False)
            self.reply_json({"id": 1})

    def kaggle_StartBlobUpload(self, body, call):
        if self.may(ME):
            token = f"token-{len(self.server.uploads)}"
            size = int(body.get("contentLength", 0))
            self.server.uploads[token] = Upload(body["name"], size)
            url = f"{self.server.url}/uploads/{token}"
            self.reply_json({"token": token, "createUrl": url})

    def kaggle_CreateModelInstance(self, body, call):
        inner = body["body"]
        key = inner["framework"], inner["instanceSlug"]
        model = self.server.models[body["ownerSlug"], body["modelSlug"]]
        if inner.get("licenseName") in self.server.unknown_licences:
            return self.reply_json({"error": "The licenseName is not valid"})
        if key in model.versions:
            return self.reply_json({"error": "exists already", "errorCode": 409})
        model.bodies[key] = inner
        model.versions[key] = [self.uploaded(inner)]
        return self.reply_json({"id": 1})

    def kaggle_CreateModelInstanceVersion(self, body, call):
        model = self.server.models[body["ownerSlug"], body["modelSlug"]]
        versions = model.versions[body["framework"], body["instanceSlug"]]
        versions.append(self.uploaded(body["body"]))
        return self.reply_json({"id": 1})

    def uploaded(self, folder, prefix=""):
        """Name to contents of what a request's tokens stand for; all must be whole."""
        files = {}
        for entry in folder.get("files", ()):
            upload = self.server.uploads[entry["token"]]
            assert len(upload.data) == upload.size
            files[prefix + upload.name] = bytes(upload.data)
        for inner in folder.get("directories", ()):
            files |= self.uploaded(inner, f"{prefix}{inner['name']}/")
        return files

    def put_upload(self, token):
        upload = self.server.uploads.get(token)
        if upload is None:
            return self.refuse(404)
        place = self.headers.get("Content-Range", "")
        if not place.startswith("bytes */"):
            start = int(re.match(r"bytes (\d+)-", place)[1]) if place else 0
            assert start == len(upload.data), "a gap, or what is there already"
            if not self.receive(upload.data):
                return None
        if len(upload.data) == upload.size:
            return self.reply(b"")
        self.send_response(308)
        if upload.data:
            self.send_header("Range", f"bytes=0-{len(upload.data) - 1}")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    # What all of these share

    def receive(self, data):
        """Appends the body to `data`; false if the connection was to break."""
        server, rest = self.server, int(self.headers["Content-Length"])
        while rest:
            count = min(rest, 1 << 14)
            allowed = self.allowed(count)
            data += self.rfile.read(allowed)
            if allowed < count:
                server.broken.set()
                if server.hangs:
                    server.released.wait()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return False
            rest -= count
        return True

    def allowed(self, count):
        """How many of the next `count` bytes are taken, over all connections."""
        server = self.server
        with server.counting:
            if server.breaks_after is None:
                return count
            allowed = min(count, server.breaks_after)
            server.breaks_after -= allowed
            if allowed < count and server.breaks_once:
                server.breaks_after = None
            return allowed

    def refuse(self, status=None, code=None, message="no"):
        status = status or self.server.status
        self.send_response(status)
        code = code or self.server.code
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        answer = {"error": message, "code": status, "message": message}
        data = json.dumps(answer).encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def reply_json(self, value):
        self.reply(json.dumps(value).encode())

    def reply(self, data, is_file=False, commit=COMMIT):
        self.send_response(200)
        kind = "application/octet-stream" if is_file else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        digest = base64.b64encode(hashlib.md5(data).digest()).decode()
        self.send_header("X-Goog-Hash", f"md5={digest}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.truncate and len(data) > 1000:
            self.wfile.write(data[:1000])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(data)


def client_environment(server, folder, **variables):
    """What a process needs to take `server` for the hubs, with caches in `folder`."""
    kept = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    package = pathlib.Path(gemma_keras.__file__).resolve().parent
    return {
        **kept,
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(package.parent),
        "PYTHONWARNINGS": "ignore",
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLEHUB_CACHE": str(folder / "kaggle"),
        **variables,
    }


@contextlib.contextmanager
def serve():
    """Runs a `Hub` on this machine.

    Yields:
        The server. `status` is what it answers to everything; `refusals` maps the end
        of an address to a status; `breaks_after` is the number of bytes of contents
        after which connections break, once or always (`breaks_once`), or hang
        (`hangs`).
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.requests, server.status, server.code = [], 200, None
    server.truncate = False
    server.kaggle_files = REPOSITORY
    server.repositories, server.lfs = {}, {}
    server.models, server.uploads, server.unknown_licences = {}, {}, ()
    server.refusals = {}
    server.breaks_after, server.breaks_once, server.hangs = None, True, False
    server.broken, server.released = threading.Event(), threading.Event()
    server.counting = threading.Lock()
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
