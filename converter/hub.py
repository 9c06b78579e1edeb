"""MODEL_PATH that is no local path: a model's id on a Hugging Face hub, downloaded into its cache by their own client.

The endpoint, a token and the offline switch are that client's own variables (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).
"""

import logging
import os
import re
from pathlib import Path

from turbotriton.contract.errors import CheckpointError

__all__ = ["local_model_path"]

logger = logging.getLogger(__name__)

#: What a checkpoint or a workspace may consist of; everything else on a hub (pictures, other frameworks' weights) stays there.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "*.bin", "*.pth", "*.pt"]
WORKSPACE_PATTERNS = ["model_repository/**", "triton_models/**"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def local_model_path(
    model_path: str | os.PathLike[str], *, revision: str | None = None, download_dir: str | os.PathLike[str] | None = None
) -> Path:
    """The folder itself, or the downloaded snapshot of a hub id. `download_dir`: the hub client's cache; None: its own choice.

    Raises CheckpointError: neither a path nor an id, or the download failed.
    """
    path = Path(model_path)
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"revision is {revision!r}, but {path} is a local path; leave it out or give a hub id")
        return path
    text = os.fspath(model_path)
    if not _ID.fullmatch(text):
        raise CheckpointError(f"{text}: does not exist, and is no hub id such as owner/name; give a model's folder or its hub id")
    return _download(text, revision, download_dir)


def _download(repo_id: str, revision: str | None, download_dir: str | os.PathLike[str] | None) -> Path:
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    cache = None if download_dir is None else Path(download_dir)
    try:
        patterns = [*PATTERNS, *WORKSPACE_PATTERNS]
        try:
            names = HfApi().list_repo_files(repo_id, revision=revision)
            if any(name.endswith(".safetensors") for name in names):  # the same weights again in torch's own format
                patterns = [pattern for pattern in patterns if pattern not in ("*.bin", "*.pth", "*.pt")]
        except (OfflineModeIsEnabled, httpx.TransportError):
            logger.info("the hub cannot be reached; looking for %s in its cache", repo_id)
        return Path(snapshot_download(repo_id, revision=revision, cache_dir=cache, allow_patterns=patterns))
    except (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        HFValidationError,
        httpx.TransportError,
        OSError,
    ) as error:
        raise CheckpointError(
            f"{repo_id}: is no local folder, and as a hub id it could not be downloaded ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:200] + "...") if len(text) > 200 else text or type(error).__name__
