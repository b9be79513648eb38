"""Upload of an exported folder to the Hugging Face hub: private unless asked otherwise, into nobody's public repository."""

from __future__ import annotations

import re
from pathlib import Path

from train_t2i.errors import UserError

TOKEN = re.compile(r"hf_\w{6,}")


def check_push(repo: str | None, *, public: bool, dry_run: bool) -> None:
    """Mistakes that can be seen before anything is exported.  Raises UserError."""
    if repo is None:
        for option, given in (("--push-public", public), ("--dry-run", dry_run)):
            if given:
                raise UserError(f"{option} without --push does nothing", "leave it out, or give --push ORG/NAME")
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {error}", "give ORG/NAME") from None
    if repo.count("/") != 1:
        raise UserError(f"--push {repo}: not a repository", "give ORG/NAME")
    if dry_run:
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {repo}: HF_HUB_OFFLINE is set", "unset it, or give --dry-run")
    if not get_token():
        raise UserError(f"--push {repo}: nobody is logged in to the hub", "run hf auth login, or set HF_TOKEN")


def files_of(folder: Path) -> list[Path]:
    """What an upload takes, by name, relative to the folder."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def listing(folder: Path, repo: str, *, public: bool) -> str:
    """A line a file with its size, and where they would go."""
    sizes = {path: (folder / path).stat().st_size for path in files_of(folder)}
    lines = [f"{size / 1e6:12.3f} MB  {path.as_posix()}" for path, size in sizes.items()]
    total = sum(sizes.values()) / 1e6
    where = f"https://huggingface.co/{repo} ({'public' if public else 'private'})"
    return "\n".join([*lines, f"{total:12.3f} MB  {len(sizes)} files, not uploaded: would go to {where}"])


def upload(folder: Path, repo: str, *, public: bool, dry_run: bool) -> str:
    """What was done, or would be, in words.  Raises UserError."""
    return listing(folder, repo, public=public) if dry_run else f"uploaded: {push(folder, repo, public=public)}"


def push(folder: Path, repo: str, *, public: bool) -> str:
    """Upload in one commit; its address.  A repository that is there keeps its visibility: a public one takes only what was
    asked to be public.  Raises UserError; the folder stays."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise UserError(f"--push {repo}: is public", "give --push-public, or another name")
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload of train_t2i export")
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        said = TOKEN.sub("hf_...", " ".join(str(error).split()))[:200]
        raise UserError(
            f"--push {repo}: not uploaded ({type(error).__name__}: {said})",
            f"the folder is whole; to try again: hf upload --private {repo} {folder}",
        ) from None
    return str(done.commit_url)
