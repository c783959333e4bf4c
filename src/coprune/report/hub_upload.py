"""Uploading a finished model to the Hugging Face Hub."""

from __future__ import annotations

import glob
from pathlib import Path

from huggingface_hub import HfApi, get_token

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.words import LeaveOut
from coprune.model.checkpoint.companions import own_files
from coprune.report.run_folder import model_of


def require_login(repository: str) -> None:
    """Raise BadInput if no user is logged in, before a run does anything slow."""
    if get_token() is None:
        raise BadInput(
            f"pushing to {repository} needs a login",
            field="push_to_hub",
            value=repository,
            fix="run `hf auth login`, or set the environment variable HF_TOKEN",
        )


def push(folder: Path | str, repository: str, private: bool = False) -> str:
    """Upload the folder of a model, with its card, to the Hugging Face Hub.

    Args:
        folder: folder of a saved model, of adapters, or of a run that saved its model.
        repository: its name on the Hub, `owner/name`; created if it does not exist.
        private: whether only its owner can see it.

    Returns:
        Its URL.

    Raises:
        BadInput: there is no model, no user is logged in, the repository exists and is public though `private` is set, or the
            Hub refuses or cannot be reached; the folder is unchanged.
    """
    place = expand_home(model_of(str(folder)))
    if not any((place / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise BadInput(
            f"{place} holds no model", field="folder", value=str(folder), fix="name the folder of a saved model"
        )
    require_login(repository)
    api = HfApi()
    # Never upload links that lead out of the folder.
    files = [glob.escape(str(path.relative_to(place))) for path in own_files(place, below=True)]
    try:
        made = api.create_repo(repository, exist_ok=True, private=private or None)
        public = private and not api.repo_info(made.repo_id).private
        if not public:
            api.upload_folder(
                folder_path=place, repo_id=made.repo_id, allow_patterns=files, commit_message="Pruned with coprune"
            )
    except Exception as error:  # network, permission or naming errors of many types
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"{place} is saved, but could not be pushed to {repository} ({reason})",
            field="push_to_hub",
            value=repository,
            fix=f"later: hf upload {repository} {place}",
        ) from error
    if public:
        fix = ("name another one, or ", LeaveOut("private"))
        raise BadInput(f"{repository} exists and is public", field="private", value=True, fix=fix)
    return str(made)
