"""Pushing to Kaggle: files as uploads that can be resumed, then a version of them.

Kaggle's library sends a file in one go and forgets about it. Here is kept, in a file of
the user's cache, where each upload was to go: an interrupted one goes on from the byte
that arrived last. https://cloud.google.com/storage/docs/performing-resumable-uploads
has the protocol.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import gemma_keras
from gemma_keras import registry
from gemma_keras.hubs.parcel import PushError

# What Kaggle calls licences, by Hugging Face's names. Others it is told by the latter.
_LICENCES = {
    "apache-2.0": "Apache 2.0",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-4.0": "Attribution 4.0 International (CC BY 4.0)",
    "cc-by-sa-4.0": "CC BY-SA 4.0",
    "cc0-1.0": "CC0: Public Domain",
    "gemma": "Gemma",
    "gpl-3.0": "GPL 3",
    "mit": "MIT",
}
# More than that, Kaggle wants as one archive.
_MAX_FILES = 50
# Seconds between attempts, while nothing arrives.
WAITS = (1, 2, 4, 8, 16)
# How long Kaggle's own command trusts an upload that was begun, in seconds.
_KEPT = 6 * 3600
_TIMEOUT = (15, 600)
_FRONT_MATTER = re.compile(r"\A---\n.*?^---\n\s*", re.DOTALL | re.MULTILINE)


class _Sdk(NamedTuple):
    """What is used of Kaggle's libraries."""

    client: type
    models: object
    enums: object
    blobs: object
    datasets: object
    requests: object
    mask: type


def _sdk():
    registry.library("kagglehub")
    try:
        import requests
        from google.protobuf.field_mask_pb2 import FieldMask
        from kagglehub.clients import build_kaggle_client
        from kagglesdk.blobs.types import blob_api_service
        from kagglesdk.datasets.types import dataset_api_service
        from kagglesdk.models.types import model_api_service, model_enums
    except ImportError as error:
        raise PushError(
            "Pushing to Kaggle needs kagglehub 1.0 or later: "
            "pip install --upgrade kagglehub"
        ) from error
    return _Sdk(
        build_kaggle_client,
        model_api_service,
        model_enums,
        blob_api_service,
        dataset_api_service,
        requests,
        FieldMask,
    )


def send(parcel, destination, options):
    """Uploads a `Parcel`; see `hubs.push`."""
    if len(parcel.files) > _MAX_FILES:
        raise PushError(
            f"{destination.handle}: Kaggle takes {_MAX_FILES} files, and there are "
            f"{len(parcel.files)}. Export again with a larger max_shard_size."
        )
    sdk = _sdk()
    parcel = parcel.naming(destination.handle)
    card = _FRONT_MATTER.sub("", parcel.card)
    with sdk.client() as client:
        api = client.models.model_api_client
        model = _model(sdk, api, destination)
        if model is None:
            _create_model(sdk, api, destination, card)
        elif options.private and not model.is_private:
            raise PushError(
                f"{destination.handle}: is public. Pass --public (in Python "
                "private=False) if everybody is to see what is pushed there, or make "
                f"it private at {destination.page}/settings."
            )
        uploads = [
            Upload(sdk, client, destination, name, content)
            for name, content in parcel.files.items()
        ]
        done, total = 0, sum(upload.size for upload in uploads)
        for upload in uploads:
            upload.run(lambda n, before=done: options.progress(before + n, total))
            done += upload.size
        tokens = {upload.name: upload.token for upload in uploads}
        _create_version(sdk, api, destination, parcel, card, tokens, options)
        for upload in uploads:
            upload.forget()
        if not options.private and (model is None or model.is_private):
            _publish(sdk, api, destination, model)


def about_rights(destination):
    """What to do about an account that may not write there."""
    return (
        f"Is {destination.owner} your name on Kaggle, or an organisation in which you "
        "may edit models? See https://www.kaggle.com/settings."
    )


def _model(sdk, api, destination):
    """The model as Kaggle has it; None if there is none, or none to be seen."""
    request = sdk.models.ApiGetModelRequest()
    request.owner_slug, request.model_slug = destination.owner, destination.name
    try:
        return api.get_model(request)
    except sdk.requests.HTTPError as error:
        if registry.http_status(error) in (403, 404):
            return None
        raise


def _create_model(sdk, api, destination, card):
    """Makes a model that nobody else sees, with a card."""
    request = sdk.models.ApiCreateModelRequest()
    request.owner_slug, request.slug = destination.owner, destination.name
    request.title, request.description = destination.name, card
    request.is_private = True
    _check(api.create_model(request), destination)


def _publish(sdk, api, destination, model):
    request = sdk.models.ApiUpdateModelRequest()
    request.owner_slug, request.model_slug = destination.owner, destination.name
    request.title = model.title if model else destination.name
    request.is_private = False
    request.update_mask = sdk.mask(paths=["is_private"])
    _check(api.update_model(request), destination)


def _create_version(sdk, api, destination, parcel, card, tokens, options):
    """Makes the variation of the uploaded files, or the next version of it."""
    body = sdk.models.ApiCreateModelInstanceRequestBody()
    body.instance_slug = destination.variation
    body.framework = _framework(sdk, destination)
    body.overview = f"{parcel.kind.name}, pushed with gemma_keras"
    body.usage = card
    _add_files(sdk, body, tokens)
    request = sdk.models.ApiCreateModelInstanceRequest()
    request.owner_slug, request.model_slug = destination.owner, destination.name
    request.body = body
    body.license_name = _LICENCES.get(parcel.licence, parcel.licence)
    answer = api.create_model_instance(request)
    if "licen" in answer.error.lower():
        options.tell(
            f"Kaggle does not take {body.license_name!r} as a licence: choose the one "
            f"that fits at {destination.page}."
        )
        body.license_name = None
        answer = api.create_model_instance(request)
    if answer.error_code == 409:
        answer = api.create_model_instance_version(_version(sdk, destination, tokens))
    _check(answer, destination)


def _version(sdk, destination, tokens):
    """The request for the next version of a variation that is there."""
    body = sdk.models.ApiCreateModelInstanceVersionRequestBody()
    body.version_notes = f"Pushed with gemma_keras {gemma_keras.__version__}"
    _add_files(sdk, body, tokens)
    request = sdk.models.ApiCreateModelInstanceVersionRequest()
    request.owner_slug, request.model_slug = destination.owner, destination.name
    request.framework = _framework(sdk, destination)
    request.instance_slug = destination.variation
    request.body = body
    return request


def _framework(sdk, destination):
    wanted = destination.framework.lower()
    for framework in sdk.enums.ModelFramework:
        name = framework.name.removeprefix("MODEL_FRAMEWORK_").replace("_", "")
        if name.lower() == wanted:
            return framework
    raise PushError(
        f"{destination.handle}: this version of kagglehub does not know the framework "
        f"{destination.framework}: pip install --upgrade kagglehub"
    )


def _add_files(sdk, body, tokens):
    """Puts the tokens of uploaded files into a request, directory by directory."""
    files, folders = [], {}
    for name, token in tokens.items():
        file = sdk.datasets.ApiDatasetNewFile()
        file.token = token
        place = files
        if "/" in name:
            place = _folder(sdk, folders, name.rsplit("/", 1)[0]).files
        place.append(file)
    body.files = files
    body.directories = [f for path, f in folders.items() if "/" not in path]


def _folder(sdk, folders, path):
    if path not in folders:
        folder = sdk.datasets.ApiUploadDirectoryInfo()
        folder.name = path.rsplit("/", 1)[-1]
        folder.files, folder.directories = [], []
        folders[path] = folder
        if "/" in path:
            _folder(sdk, folders, path.rsplit("/", 1)[0]).directories.append(folder)
    return folders[path]


def _check(answer, destination):
    """Kaggle answers 200 also where it refuses."""
    if answer.error:
        code = f" ({answer.error_code})" if getattr(answer, "error_code", 0) else ""
        raise PushError(
            f"{destination.handle}: Kaggle refuses{code}: {answer.error} "
            f"{about_rights(destination)}"
        )


class Upload:
    """One file on its way, and the note of where it goes.

    Attributes:
        name: Its name on the hub.
        size: Its bytes.
        token: What stands for the file in a version.
    """

    def __init__(self, sdk, client, destination, name, content):
        self._sdk, self._client = sdk, client
        self.name, self._content = name, content
        in_memory = isinstance(content, bytes)
        self.size = len(content) if in_memory else content.stat().st_size
        self._handle = destination.handle
        self._note = _notes() / f"{self._key(destination)}.json"
        self.token = self._url = None
        self._complete = False
        self._broken = (sdk.requests.ConnectionError, sdk.requests.Timeout)

    def _key(self, destination):
        """The same for the same file, to the same owner."""
        content = self._content
        if isinstance(content, bytes):
            identity = hashlib.sha256(content).hexdigest()
        else:
            status = content.stat()
            identity = f"{content.resolve()} {status.st_size} {status.st_mtime_ns}"
        said = f"{destination.owner} {self.name} {identity}"
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def run(self, progress):
        """Sends what has not arrived; calls `progress` with the bytes that have."""
        arrived = self._resume()
        if arrived is None:
            arrived = self._begin()
        failures = 0
        while not self._complete:
            progress(arrived)
            try:
                now = self._put(arrived, progress)
            except self._broken:
                if failures == len(WAITS):
                    raise
                time.sleep(WAITS[failures])
                now = self._ask_patiently(arrived)
            failures = 0 if now > arrived else failures + 1
            arrived = now
        progress(self.size)

    def _resume(self):
        """Bytes that arrived of an earlier attempt; None without one."""
        try:
            note = json.loads(self._note.read_text("utf-8"))
            fresh = 0 <= time.time() - note["time"] < _KEPT
            self.token, self._url = str(note["token"]), str(note["url"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self._ask() if fresh else None

    def _begin(self):
        request = self._sdk.blobs.ApiStartBlobUploadRequest()
        request.type = self._sdk.blobs.ApiBlobType.MODEL
        request.name = self.name.rsplit("/", 1)[-1]
        request.content_length = self.size
        answer = self._client.blobs.blob_api_client.start_blob_upload(request)
        self.token, self._url = answer.token, answer.create_url
        note = {"token": self.token, "url": self._url, "time": time.time()}
        # Without the note, an interrupted push begins anew.
        with contextlib.suppress(OSError):
            self._note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial = self._note.with_suffix(f".{os.getpid()}")
            # Who has the address may write there.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with open(os.open(partial, flags, 0o600), "w") as file:
                json.dump(note, file)
            partial.replace(self._note)
        return 0

    def _ask(self):
        """Bytes that have arrived; None if the upload is not known any more."""
        headers = {"Content-Range": f"bytes */{self.size}", "Content-Length": "0"}
        answer = self._sdk.requests.put(self._url, headers=headers, timeout=_TIMEOUT)
        if 400 <= answer.status_code < 500:
            return None
        return self._read(answer)

    def _ask_patiently(self, arrived):
        """The same after an interruption; what arrived before, if nobody answers."""
        with contextlib.suppress(*self._broken):
            found = self._ask()
            return self._begin() if found is None else found
        return arrived

    def _put(self, start, progress):
        """Sends the rest, from byte `start` on; gives what `_ask` does."""
        content = self._content
        in_memory = isinstance(content, bytes)
        with io.BytesIO(content) if in_memory else content.open("rb") as file:
            body = _Rest(file, start, self.size, progress)
            headers = {"Content-Type": "application/octet-stream"}
            if self.size:
                headers["Content-Range"] = f"bytes {start}-{self.size - 1}/{self.size}"
            answer = self._sdk.requests.put(
                self._url, data=body, headers=headers, timeout=_TIMEOUT
            )
        return self._read(answer)

    def _read(self, answer):
        """Bytes that have arrived, by the answer to what was sent or asked."""
        if answer.status_code in (200, 201):
            self._complete = True
            return self.size
        if answer.status_code == 308:  # "Resume Incomplete"
            match = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("Range", ""))
            return min(int(match[1]) + 1, self.size) if match else 0
        if answer.status_code >= 500:
            raise self._sdk.requests.ConnectionError(
                f"an upload was answered with {answer.status_code}"
            )
        answer.raise_for_status()
        raise PushError(
            f"{self._handle}: the upload of {self.name} was answered with "
            f"{answer.status_code}."
        )

    def forget(self):
        """Removes the note."""
        with contextlib.suppress(OSError):
            self._note.unlink()


class _Rest:
    """A file from one byte on, as `requests` wants it: with a length."""

    def __init__(self, file, start, size, progress):
        self._file, self._progress = file, progress
        self._position, self._size = start, size
        file.seek(start)

    def __len__(self):
        return self._size - self._position

    def read(self, count=-1):
        """The next bytes."""
        data = self._file.read(count)
        self._position += len(data)
        self._progress(self._position)
        return data


def _notes():
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "gemma_keras" / "kaggle_uploads"
