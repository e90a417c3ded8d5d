"""
The way to the Hugging Face Hub and back: every call of its client that publishes or fetches, and one message for each
way in which such a call can fail.

Nothing here runs without a flag that asks for it. Files are read, never changed; what is fetched is checked by name
before the first byte is written.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or its successor, whichever this client is built on
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from .config import InputError


# Text that a command line or a variable may have found its way into
_TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".html", ".yaml", ".yml", ".txt", ".svg")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
# What calls of the client raise that is no answer to the caller's own mistake
_ANSWERS = (HTTPError, EntryNotFoundError, FileMetadataError, ConnectionError, TimeoutError)
_UNCHANGED = "Nothing here was changed: check the network and run the command again."
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Upload:
    """
    What one repository gets in one commit.

    Args:
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`.
        repo_id (`str`): `user/name`.
        files (`Mapping[str, Path | bytes]`): Path in the repository -> a file here, or its content.
        replaces (`Sequence[str]`, *optional*): Patterns (`"results/*"`) of files of an earlier publication that are removed.
    """

    repo_type: str
    repo_id: str
    files: Mapping[str, Path | bytes]
    replaces: Sequence[str] = ()


@contextlib.contextmanager
def hub_errors(field: str, repo_id: str, kind: str = "repository", is_transfer: bool = False) -> Iterator[None]:
    """
    Turns whatever a call of the Hub's client raises into one `InputError`.

    Args:
        field (`str`): The argument that named the repository.
        repo_id (`str`): What it named.
        kind (`str`, *optional*): What was looked for there, for the message.
        is_transfer (`bool`, *optional*, defaults to `False`): Whether nothing but files is sent or fetched, so that
            errors of any other type tell of that too: storage backends have types of their own.
    """
    try:
        yield
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(
            field, repo_id, "cannot be the name of a repository on the Hub.", "Write user/name."
        ) from error
    except _ANSWERS as error:
        raise InputError(field, repo_id, *_told(error, kind)) from error
    except (RuntimeError, OSError, ValueError) as error:
        # Uploads of large files wrap the answer that ended them.
        if isinstance(error.__cause__, _ANSWERS):
            raise InputError(field, repo_id, *_told(error.__cause__, kind)) from error
        if not is_transfer:
            raise
        raise InputError(field, repo_id, f"the transfer failed ({_first_line(error)}).", _UNCHANGED) from error


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or "no answer").splitlines()[0]
    return f"{type(error).__name__}: {text[:200]}"


def _told(error: Exception, kind: str) -> tuple[str, str]:
    """Rule and remedy for an answer that the Hub gave, or for none."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what kept the client from asking is the reason, not that its cache is empty
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids every request to the Hub.", "Unset it."
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub cannot be reached, or dropped the connection ({_first_line(error)}).", _UNCHANGED
    status = error.response.status_code
    if status == 401:
        return (
            "the Hub does not accept the login, or there is none (401); it says the same of names that do not exist.",
            f"Check the name, and {_LOGIN}.",
        )
    if status == 403:
        return "this login has no right to do that (403).", f"Use your own namespace, or {_LOGIN} with write access."
    if status == 404 and isinstance(error, EntryNotFoundError):
        return f"the repository is there, and holds no {kind} (404).", "Check the name."
    if status == 404 and isinstance(error, RevisionNotFoundError):
        return "the repository is there, and has no such revision (404).", "Check --revision."
    if status == 404:
        return f"the Hub has no such {kind} (404).", f"Check the name; where it is private, {_LOGIN}."
    if status == 409:
        return "is there already (409).", "Give --overwrite to publish into it, or another name."
    said = (error.server_message or "").strip().splitlines()
    return f"the Hub answers with status {status}{f' ({said[0][:200]})' if said else ''}.", "Try again later."


def check_repo_id(field: str, repo_id: str) -> None:
    """Raises `InputError` unless `repo_id` reads `user/name`."""
    with hub_errors(field, repo_id):
        validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise InputError(field, repo_id, "must name its owner too.", f"Write user/{repo_id}.")


def fetch_text(repo_id: str, name: str, missing: str | None = None, **options: Any) -> str:
    """
    A text file of a model repository; to be called within `hub_errors`.

    Args:
        repo_id (`str`): `user/name`.
        name (`str`): Its path.
        missing (`str`, *optional*): What to return when the repository has no such file; it is an error by default.
        options: Of `huggingface_hub.hf_hub_download`.
    """
    try:
        return Path(hf_hub_download(repo_id, name, **options)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        if missing is None:
            raise
        return missing


def prepare_repo(field: str, name: str, private: bool | None = None, token: str | None = None) -> str:
    """
    Makes sure, before a long run, that its model can be pushed: creates the repository, or finds it there.

    Args:
        field (`str`): The argument that named it, for messages.
        name (`str`): `user/name`, or a name alone for the namespace of the one who is logged in.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`str`, *optional*): Of another login than the stored one.

    Returns:
        `str`: `user/name`.

    Raises:
        `InputError`: If it cannot be written to.
    """
    with hub_errors(field, name):
        return HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id


def publish(
    uploads: Sequence[Upload],
    field: str = "repo",
    overwrite: bool = False,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Publish with hf-alrs",
) -> list[str]:
    """
    Creates repositories and fills each with one commit, so that readers see all of it or nothing.

    Args:
        uploads (`Sequence[Upload]`): What goes where. None is created when one of them is there already.
        field (`str`, *optional*): The argument that named the repositories, for messages.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to commit into repositories that are there.
        private (`bool`, *optional*): Whether new repositories are private.
        token (`str`, *optional*): Of another login than the stored one.
        message (`str`, *optional*): Of the commits.

    Returns:
        `list[str]`: The address of each repository.

    Raises:
        `InputError`: If a file holds an access token, a repository is there already, or the Hub refuses or cannot be
            reached. No local file is changed in any case.
    """
    api = HfApi(token=token)
    for upload in uploads:
        check_repo_id(field, upload.repo_id)
        _refuse_tokens(upload.files, token)
    for upload in uploads if not overwrite else ():
        with hub_errors(field, upload.repo_id):
            there = api.repo_exists(upload.repo_id, repo_type=upload.repo_type)
        if there:
            raise InputError(
                field,
                upload.repo_id,
                f"a {upload.repo_type} of this name is on the Hub already.",
                "Give --overwrite to publish into it (its history keeps the former files), or another name.",
            )
    addresses = []
    for upload in uploads:
        with hub_errors(field, upload.repo_id):
            created = api.create_repo(
                upload.repo_id,
                repo_type=upload.repo_type,
                private=private,
                exist_ok=overwrite,
                space_sdk="static" if upload.repo_type == "space" else None,
            )
        try:
            with hub_errors(field, upload.repo_id, is_transfer=True), _quiet():
                _commit(api, upload, overwrite, message)
        except InputError as error:
            remedy = f"{error.remedy} The repository may be there by now, and empty: then give --overwrite."
            raise InputError(
                error.field, error.value, error.rule, remedy if not overwrite else error.remedy
            ) from error
        addresses.append(str(created))
    return addresses


def _commit(api: HfApi, upload: Upload, overwrite: bool, message: str) -> None:
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in upload.files.items()
    ]
    if overwrite and upload.replaces:
        there = api.list_repo_files(upload.repo_id, repo_type=upload.repo_type)
        stale = [name for name in there if _is_replaced(name, upload) and name not in upload.files]
        operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
    api.create_commit(upload.repo_id, operations, commit_message=message, repo_type=upload.repo_type)


def _is_replaced(name: str, upload: Upload) -> bool:
    patterns = (
        pattern for pattern in upload.replaces if "/" in pattern or "/" not in name
    )  # the others are of the top
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The files are small, and a bar for each would bury the one line that says where they went."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _refuse_tokens(files: Mapping[str, Path | bytes], token: str | None) -> None:
    secrets = [secret.encode() for secret in (token, get_token()) if secret]
    for name, content in files.items():
        if not name.endswith(_TEXT_SUFFIXES):
            continue
        text = content if isinstance(content, bytes) else content.read_bytes()
        if _TOKEN.search(text) or any(secret in text for secret in secrets):
            raise InputError(
                "files", name, "holds an access token, which must not be published.", "Take it out of the file."
            )


def download(
    repo_id: str,
    repo_type: str,
    folder: str,
    target: Path,
    pattern: str = ".*",
    revision: str | None = None,
    field: str = "repo",
) -> list[str]:
    """
    Copies files under a folder of a repository.

    Args:
        repo_id (`str`): `user/name`.
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`.
        folder (`str`): Such as `"results"`; it is left out of the names here.
        target (`Path`): Where they are written.
        pattern (`str`, *optional*): What the rest of a name must match; other files are left where they are.
        revision (`str`, *optional*): Branch, tag or commit; the newest commit of `main` by default.
        field (`str`, *optional*): The argument that named the repository, for messages.

    Returns:
        `list[str]`: Names relative to `target`.

    Raises:
        `InputError`: If the Hub refuses or cannot be reached, if nothing is there, or if any name in the repository
            points elsewhere than below its folder.
    """
    check_repo_id(field, repo_id)
    api = HfApi()
    with hub_errors(field, repo_id, repo_type):
        info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    for name in names:
        _check_name(field, repo_id, name)
    start = f"{folder}/"
    wanted = sorted(
        name for name in names if name.startswith(start) and re.fullmatch(pattern, name.removeprefix(start))
    )
    if not wanted:
        raise InputError(
            field, repo_id, f"this {repo_type} has no folder `{folder}`.", "Give one that `hf-alrs publish` made."
        )
    for name in wanted:
        with hub_errors(field, repo_id, name, is_transfer=True), _quiet():
            # By the commit's id, so that all files are of one publication
            cached = api.hf_hub_download(repo_id, name, repo_type=repo_type, revision=info.sha)
        path = target / name.removeprefix(start)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Path(cached).read_bytes())
    return [name.removeprefix(start) for name in wanted]


def _check_name(field: str, repo_id: str, name: str) -> None:
    # Colons and backslashes mean a drive or a folder on some systems.
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f]", name):
        raise InputError(
            field,
            repo_id,
            f"holds a file called {name!r}, which could be written outside the folder it belongs in; nothing was written.",
            "Do not use this repository.",
        )
