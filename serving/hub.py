"""Pushing an exported folder to a hub, after a question. The token comes from the environment alone."""

import os
import sys
from pathlib import Path

from files.console import InputError, say

TOKEN = "HF_TOKEN"


def check_push(repo: str) -> None:
    """Raise InputError for what no hub would take as a name, without a token, and where nobody can answer the question."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push {repo}: {error}") from None
    if not os.environ.get(TOKEN):
        raise InputError(f"--push needs a token that may write in the environment variable {TOKEN}")
    if not sys.stdin.isatty():
        raise InputError("--push asks before it pushes, and there is no terminal to answer in: run it in one, or leave it out")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def push(folder: Path, repo: str, private: bool) -> bool:
    """Ask, make the repository unless it exists, and upload the folder -> whether the answer was yes.

    Raises InputError where the hub cannot be reached or refuses; the folder is left as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the client that the hub package uses

    try:
        api = HfApi(token=os.environ[TOKEN])
        kind = "an existing repository" if api.repo_exists(repo) else "private" if private else "public"
        answer = input(f"Push {folder}/ ({folder_bytes(folder) / 1e6:,.0f} MB, {kind}) to {repo}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            say(f"not pushed: {folder} is kept")
            return False
        api.create_repo(repo, private=private, exist_ok=True)
        url = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add an exported embedding model")
    except (HTTPError, OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{repo}: not pushed: {reason}. {folder} is kept: hf upload {repo} {folder}") from None
    say(f"pushed: {url.commit_url}")
    return True
