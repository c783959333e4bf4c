"""Putting a finished model on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token

from coprune.base.errors import BadInput


def require_login(repository: str) -> None:
    """Raise BadInput if nobody is logged in, before a run does anything slow."""
    if get_token() is None:
        raise BadInput(
            f"pushing to {repository} needs a login",
            field="push_to_hub",
            value=repository,
            fix="use `hf auth login`, or the environment variable HF_TOKEN",
        )


def push(folder: Path, repository: str) -> str:
    """Upload a saved model with its card; the repository is made if it does not exist. Returns its address.

    Raises BadInput if the Hub refuses or is out of reach; the folder stays as it is.
    """
    api = HfApi()
    try:
        made = api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=made.repo_id, commit_message="Pruned with coprune")
    except Exception as error:  # no name, no route, no right to write, a name that the Hub refuses
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"{folder} is saved, but could not be pushed to {repository} ({reason})",
            field="push_to_hub",
            value=repository,
            fix=f"later: hf upload {repository} {folder}",
        ) from error
    return str(made)
