"""Repositories of the Hub wherever a folder is taken: `OWNER/NAME`, with `@REVISION` and `/SUBFOLDER` if wanted.

That is how huggingface_hub's file system writes them; `hf://` before it is allowed. A folder that is here comes first,
as in transformers. What is downloaded lies in the Hub's cache, and a second call takes it from there. Only what is read
is fetched: configurations, safetensors, tokenizer, and Python files, which are not run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

_PLACE = re.compile(
    r"(?:hf://)?(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>refs/pr/\d+|refs/convert/[\w.-]+|[^/@]+))?(?:/(?P<inside>[^/].*?))?/?"
)
_SNAPSHOT = re.compile(r".*/models--([^/]+)--([^/]+)/snapshots/[^/]+(?:/(.+))?")
_NOWHERE = "There is no folder {!r}; a repository of the Hub is called 'OWNER/NAME'."
_READ = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "adapter_model.bin")
_NOT_READ = ("*/*", "consolidated*", "original*")  # of the folder that is asked for


class Repository(NamedTuple):
    """A place on the Hub.

    Attributes:
        name: "owner/name".
        revision: branch, tag or commit; None: the main branch.
        inside: a folder in it, or a file of GGUF; "": the repository itself.
    """

    name: str
    revision: str | None
    inside: str


def repository(place: Any) -> Repository | None:
    """The repository that `place` names; None if it is a path (a `PathLike` is), or something else."""
    if not isinstance(place, str) or os.path.exists(place):
        return None
    found = _PLACE.fullmatch(place)
    if found is None or ".." in place.split("/"):
        return None
    return Repository(found["name"], found["revision"], found["inside"] or "")


def cached(place: Any) -> Path | None:
    """The folder of the Hub's cache that holds all of a repository; None if `place` names none. It may not exist."""
    named = repository(place)
    return (
        None
        if named is None
        else Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=named.name, repo_type="model")
    )


def check_place(place: str | os.PathLike) -> None:
    """Raise FileNotFoundError for what `from_pretrained` finds nowhere: neither a folder here nor the name of a
    repository, which, for transformers, may do without an owner.
    """
    if os.path.exists(place):
        return
    try:
        if isinstance(place, str):
            return validate_repo_id(place)
    except HFValidationError:
        pass
    raise FileNotFoundError(_NOWHERE.format(str(place)))


def fetched(place: str | os.PathLike) -> Path:
    """The path of a folder (or of a GGUF file), which is downloaded if `place` names a repository.

    Raises:
        FileNotFoundError: there is neither such a folder or file nor such a repository, revision or subfolder.
        OSError: the Hub was not reached, or it failed.
    """
    if os.path.exists(place):
        return Path(place)
    named = repository(place)
    if named is None:
        raise FileNotFoundError(_NOWHERE.format(str(place)))
    folder = f"{named.inside}/" if named.inside else ""
    wanted, unwanted = [folder + pattern for pattern in _READ], [folder + pattern for pattern in _NOT_READ]
    if named.inside.endswith(".gguf"):
        wanted, unwanted = [named.inside], []
    here = f"There is no folder {str(place)!r} here, and"
    try:
        root = huggingface_hub.snapshot_download(
            named.name, revision=named.revision, allow_patterns=wanted, ignore_patterns=unwanted
        )
    except GatedRepoError as error:
        raise PermissionError(
            f"{here} the repository {named.name!r} of the Hub is gated. Ask for access on its page, then "
            "`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"The repository {named.name!r} of the Hub has no revision {named.revision!r}."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{here} no repository {named.name!r} on the Hub that you may read. Check the name; of a private one, "
            "`hf auth login` first."
        ) from error
    except Exception as error:  # of the network, in the words of several packages
        said = (str(error).strip().splitlines() or [""])[0]
        raise OSError(
            f"{here} {named.name!r} could not be fetched from the Hub ({type(error).__name__}: {said})."
        ) from error
    path = Path(root, named.inside)
    if not path.exists():
        raise FileNotFoundError(f"The repository {named.name!r} of the Hub has no {named.inside!r} to read.")
    return path


def called(path: str | os.PathLike) -> str | None:
    """ "owner/name" or "owner/name/subfolder" of a folder in the Hub's cache; None of others."""
    found = _SNAPSHOT.fullmatch(Path(os.path.abspath(path)).as_posix())
    return None if found is None else "/".join(part for part in found.groups() if part)
