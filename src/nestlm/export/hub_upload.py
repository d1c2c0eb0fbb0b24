"""Upload an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from nestlm.errors import ExportError


def check_hub_token(name: str) -> None:
    """Raise ExportError unless `name` has the form OWNER/NAME and a token of the hub is found."""
    from huggingface_hub import get_token

    if name.count("/") != 1:
        raise ExportError(f"export: --push-to-hub got {name!r}, wanted OWNER/NAME")
    if get_token() is None:
        raise ExportError("export: --push-to-hub needs a token; log in with hf auth login, or set HF_TOKEN")


def upload_model(folder: Path, name: str) -> None:
    """Upload a folder to the hub's repository `name`, which is created as a private one if it does not exist.

    Raises:
        ExportError: the hub refuses the upload, or cannot be reached. The folder is kept.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add the model")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"export: {folder} is complete, but the hub did not take it ({reason}); try hf upload {name} {folder}"
        ) from error
