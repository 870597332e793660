"""Put a finished model folder on the model hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from mergectl.errors import UserError, WorkError


class Target(NamedTuple):
    """Where a merge goes, however it was asked for."""

    out: Path | None
    force: bool
    shard_size: str | None = None
    push: str | None = None
    public: bool = False

    def check(self) -> None:
        """Refuse, before any work, what cannot be pushed."""
        check_repo(self.push, self.public)
        if self.push is not None and self.out is None:
            raise UserError("Without an output folder there is nothing to push. Add -o FOLDER.")

    def finish(self) -> dict[str, str]:
        """Push what lies in the folder, if asked to; return what there is to say about it."""
        if self.push is None or self.out is None:
            return {}
        return {"pushed": push(self.out, self.push, public=self.public)}


def check_repo(repo: str | None, public: bool) -> None:
    """Refuse, before any work, what cannot be a model's name on the hub."""
    if repo is None:
        if public:
            raise UserError("--public says how to push, but nothing is pushed. Add --push ORG/NAME.")
    elif not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo, re.ASCII) or re.search(
        r"--|\.\.|(^|/)[-.]|[-.](/|$)|\.git$", repo
    ):
        raise UserError(f"--push {repo} is not a name on the hub. Write ORG/NAME, or your own user name and NAME.")


def push(folder: Path, repo: str, *, public: bool = False) -> str:
    """Upload a complete model folder, private unless `public`; return its address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(repo, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload a model merged with mergectl")
    except Exception as error:  # whatever ended the upload, the model is complete
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WorkError(
            f"The merged model is complete in {folder}, but was not pushed to {repo}: {reason[0].rstrip('.')}. "
            f"Log in by 'hf auth login' and push it by 'hf upload {repo} {folder}'."
        ) from error
    return str(address)
