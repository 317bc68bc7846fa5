"""Models and adapters to the hubs: `push` to Hugging Face and Kaggle.

Only through the hubs' own libraries, which keep the credentials, and which are imported
when they are needed.
"""

import contextlib
import importlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from gemma_keras import registry
from gemma_keras.hubs.parcel import Parcel, PushError, pack

__all__ = ["Destination", "Parcel", "PushError", "pack", "push", "upload_preset"]

_PART = r"[\w][\w.-]*"
_HF = re.compile(rf"hf://(?P<owner>{_PART})/(?P<name>{_PART})")
_KAGGLE = re.compile(
    rf"kaggle://(?P<owner>{_PART})/(?P<name>{_PART})"
    rf"/(?P<framework>{_PART})/(?P<variation>{_PART})"
)
# As Hugging Face has it.
_MAX_NAME = 96
_SENDERS = {registry.HuggingFace: "hugging_face", registry.Kaggle: "kaggle"}
_FORMS = "hf://organisation/name or kaggle://owner/model/framework/variation"
# As Kaggle writes them in addresses.
FRAMEWORKS = (
    "coral flax gemmaCpp ggml gguf jax keras maxText mxnet onnx other pax pyTorch "
    "scikitLearn tensorFlow1 tensorFlow2 tensorRtLlm tfJs tfLite transformers triton"
).split()


class Destination(NamedTuple):
    """Where something is pushed: a handle in parts."""

    handle: str
    hub: type
    owner: str
    name: str
    # Of Kaggle; else None.
    framework: str | None = None
    variation: str | None = None

    @property
    def page(self):
        """Address of the model's page."""
        return self.hub.page(self.handle)

    @property
    def format(self):
        """What `export` calls the format that belongs there; None if that is open."""
        if self.framework is None:
            return "hf"
        formats = {"keras": "keras", "gguf": "gguf"}
        formats |= {"transformers": "hf", "pyTorch": "hf"}
        return formats.get(self.framework)

    def check_login(self):
        """Raises `PushError` where the hub's library finds no credentials."""
        if not self.hub.has_credentials():
            raise PushError(
                f"{self.handle}: you are not logged in to {self.hub.name}. "
                f"{self.hub.login}"
            )

    @classmethod
    def read(cls, handle) -> "Destination":
        """Takes a handle apart.

        Raises:
            PushError: it is none that something can be pushed to.
        """
        text = str(handle).strip()
        if match := _HF.fullmatch(text):
            found = cls(text, registry.HuggingFace, **match.groupdict())
        elif match := _KAGGLE.fullmatch(text):
            found = cls(text, registry.Kaggle, **match.groupdict())
            known = {name.lower(): name for name in FRAMEWORKS}
            framework = known.get(found.framework.lower())
            if framework is None:
                raise PushError(
                    f"{text}: Kaggle knows no framework {found.framework!r}; it knows "
                    f"{', '.join(FRAMEWORKS)}."
                )
            found = found._replace(framework=framework)
        else:
            raise PushError(f"{text}: {_wrong_form(text)}")
        for part in (found.owner, found.name):
            if len(part) > _MAX_NAME or re.search(r"--|\.\.|[-.]$", part):
                raise PushError(
                    f"{text}: {part!r} is no name that a hub takes: at most "
                    f"{_MAX_NAME} characters, without -- or .., and not ending with "
                    "- or a dot."
                )
        return found


def _wrong_form(text):
    if re.fullmatch(r"hf://[^/@]+/[^/@]+@.*", text):
        return "leave the revision away; a push goes to the main branch."
    if re.fullmatch(r"hf://[^/]+/?", text):
        return f"says no organisation or user; write {_FORMS}."
    if re.fullmatch(r"kaggle://([^/]+/){4}\d+/?", text):
        return "leave the version away; a push makes the next one."
    if re.fullmatch(rf"{_PART}/{_PART}", text):
        return f"which hub? Write hf://{text} for Hugging Face."
    return f"is no handle that can be pushed to; write {_FORMS}."


class Options(NamedTuple):
    """How to push: the arguments of `push` of the same names."""

    private: bool
    overwrite: bool
    tell: Callable[[str], None]
    progress: Callable[[int, int], None]


def push(
    source,
    handle,
    *,
    private=True,
    licence=None,
    overwrite=False,
    progress=None,
    tell=None,
):
    """Uploads a model or an adapter that lies on this machine.

    What is there decides what it is: a KerasHub preset, a Hugging Face directory, a
    GGUF file or a directory with one, or the directory of a PEFT adapter. Its model
    card goes along; one is written if there is none. After an interruption, the same
    call goes on with what has not arrived. Nothing shows on the hub before all of it
    is there.

    Args:
        source: The directory, or the GGUF file.
        handle: `hf://organisation/name`, or
            `kaggle://owner/model/framework/variation`. The model is made if there is
            none; what was pushed there before is replaced, and stays in its history.
        private: Whether nobody else may see it. False makes the model public once all
            is there. A model that is public already takes nothing private.
        licence: What the files are under, as Hugging Face writes it, if nothing beside
            them says so; `"gemma"` by default.
        overwrite: Whether to replace weights on Hugging Face that no push put there.
        progress: Called as `progress(done_bytes, total_bytes)` while Kaggle is sent
            to; Hugging Face's library has a display of its own.
        tell: Called with each sentence that a person should read; they go to stderr by
            default.

    Returns:
        The address of the model's page.

    Raises:
        PushError: the source is not complete, the handle of another form, or the hub
            refuses or cannot be reached. The message says what to do.
    """
    options = Options(
        private, overwrite, tell or _say, progress or (lambda done, total: None)
    )
    destination = Destination.read(handle)
    parcel = pack(source, licence)
    _check_framework(parcel, destination)
    if parcel.left_out:
        options.tell(f"Left out, being no part of it: {', '.join(parcel.left_out)}.")
    sender = _SENDERS[destination.hub]
    module = importlib.import_module(f"gemma_keras.hubs.{sender}")
    try:
        destination.check_login()
        # Both hubs talk on stdout, which belongs to answers.
        with contextlib.redirect_stdout(sys.stderr):
            module.send(parcel, destination, options)
    except PushError:
        raise
    except registry.SourceError as error:
        raise PushError(f"{destination.handle}: {error}") from error
    # The hubs raise what their HTTP libraries do, and change these.
    except Exception as error:
        reason = _explain(error, destination, module)
        raise PushError(f"{destination.handle}: {reason}") from error
    return destination.page


def upload_preset(uri, preset):
    """KerasHub's name for `push(preset, uri)`; a new model is private here."""
    push(preset, uri)


def _say(text):
    print(text, file=sys.stderr, flush=True)


def _check_framework(parcel, destination):
    fitting = (*parcel.kind.frameworks, "other")
    if destination.framework in (None, *fitting):
        return
    better = destination.handle.split("/")
    better[-2] = fitting[0]
    raise PushError(
        f"{destination.handle}: what is pushed is {parcel.kind.name}, which is not for "
        f"{destination.framework}. Write {'/'.join(better)}."
    )


def _explain(error, destination, module):
    """What happened and what to do, in a sentence or two."""
    hub, status = destination.hub.name, registry.http_status(error)
    if status == 401:
        return f"{hub} does not accept your credentials (401). {destination.hub.login}"
    if status in (403, 404):
        return (
            f"{hub} refuses ({status}): {_said(error)} "
            f"{module.about_rights(destination)}"
        )
    if status in (409, 412):
        return (
            f"{hub} answered {status}: the model was changed by somebody else in the "
            "meantime. Run the same command again."
        )
    if status == 429:
        return f"{hub} asks to slow down (429). Run the same command again later."
    if status is not None:
        return (
            f"{hub} answered {status}: {_said(error)} Run the same command again later."
        )
    reason = f"{type(error).__name__}: {error}"
    if not _is_of_the_network(error):
        return f"the push failed ({reason})."
    return (
        f"{hub} could not be reached, or the connection broke off ({reason}). Check "
        "the network and run the same command again: it goes on with what has not "
        "arrived."
    )


def _said(error):
    """What the hub wrote about an error, as a sentence of bounded length."""
    said = getattr(error, "server_message", None)
    if said is None:
        with contextlib.suppress(AttributeError, ValueError, TypeError):
            said = error.response.json().get("message")
    said = " ".join(str(said or "it does not say why").split())[:300]
    return said if said.endswith(".") else f"{said}."


def _is_of_the_network(error):
    """Whether an exception, or one behind it, is what connections raise."""
    while error is not None:
        # Those of `requests` are such; `httpx`, also under other names, has its own.
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or library.startswith("httpx"):
            return True
        error = error.__cause__ or error.__context__
    return False
