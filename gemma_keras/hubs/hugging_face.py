"""Pushing to Hugging Face: all files of a model in one commit.

Large files are uploaded before it, by their contents: what has arrived is not sent
again. Until the commit, nobody sees anything.
"""

import fnmatch

import gemma_keras
from gemma_keras import registry
from gemma_keras.checkpoints import gguf_writer
from gemma_keras.checkpoints.checkpoint import some
from gemma_keras.checkpoints.provenance import CARD
from gemma_keras.hubs.parcel import PushError

# Titles of commits: by these, a later push knows its own files from those of others.
_TITLE = "Push with gemma_keras"
_FIRST = "initial commit"
# Files beside which another model would not be the one that is loaded.
_WEIGHTS = ("*.safetensors", "*.h5", "*.bin", "*.index.json", "model.weights.json")


def send(parcel, destination, options):
    """Uploads a `Parcel`; see `hubs.push`."""
    hub = registry.library("huggingface_hub")
    repo = f"{destination.owner}/{destination.name}"
    api = hub.HfApi(library_name="gemma_keras", library_version=gemma_keras.__version__)
    info = _find(hub, api, repo)
    if info is None:
        api.create_repo(repo, private=options.private, exist_ok=True)
        info = api.model_info(repo)
    if options.private and not info.private:
        raise PushError(
            f"{destination.handle}: is public. Pass --public (in Python "
            "private=False) if everybody is to see what is pushed there, or make it "
            f"private at {destination.page}/settings."
        )
    parcel = parcel.naming(destination.handle, repo)
    added, removed = _changes(parcel, _there(hub, api, repo), destination, options)
    operations = [hub.CommitOperationAdd(name, added[name]) for name in added]
    operations += [hub.CommitOperationDelete(name) for name in removed]
    title = f"{_TITLE} {gemma_keras.__version__}"
    # The parent: what is there now must be what was just looked at.
    api.create_commit(repo, operations, commit_message=title, parent_commit=info.sha)
    if info.private and not options.private:
        api.update_repo_settings(repo, private=False)


def about_rights(destination):
    """What to do about an account that may not write there."""
    hub = registry.library("huggingface_hub")
    try:
        account = hub.HfApi().whoami()
    except Exception:  # the first error is the one to tell
        account = {}
    names = [account.get("name"), *(org["name"] for org in account.get("orgs", ()))]
    if names[0] is not None and destination.owner not in names:
        others = f", and your organisations are {', '.join(names[1:])}"
        return (
            f"{destination.owner} is neither you nor an organisation of yours: you are "
            f"{names[0]}{others if names[1:] else ''}."
        )
    return (
        "The token needs the right to write: make one at "
        "https://huggingface.co/settings/tokens and run `hf auth login`."
    )


def _find(hub, api, repo):
    """What the hub says of a repository; None if there is none, or none to be seen."""
    try:
        return api.model_info(repo, timeout=30)
    except hub.errors.RepositoryNotFoundError as error:
        # A token that is wrong is answered like this too.
        if registry.http_status(error) == 401:
            api.whoami()
        return None


def _there(hub, api, repo):
    """Name of each file in the repository to the title of its last commit."""
    tree = api.list_repo_tree(repo, recursive=True, expand=True)
    files = [entry for entry in tree if isinstance(entry, hub.hf_api.RepoFile)]
    return {f.path: f.last_commit.title if f.last_commit else "" for f in files}


def _changes(parcel, there, destination, options):
    """(name to content of what is added or replaced, names of what is removed)."""
    added = dict(parcel.files)
    if parcel.single:
        # One more file of its kind, beside what is there and its papers.
        weights = {name for name in added if name.endswith(gguf_writer.SUFFIX)}
        return {n: added[n] for n in added if n in weights or n not in there}, []
    ours = {name for name, title in there.items() if title.startswith(_TITLE)}
    others = there.keys() - ours
    models = {
        name
        for name in others
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _WEIGHTS)
    }
    if models and not options.overwrite:
        raise PushError(
            f"{destination.handle}: holds a model that no push put there "
            f"({some(models)}). Name another repository, or pass --force (in Python "
            "overwrite=True) to replace it."
        )
    if CARD in others and there[CARD] != _FIRST:
        del added[CARD]
        options.tell(f"The {CARD} there was edited and is kept.")
    return added, sorted((ours | models) - added.keys() - {CARD})
