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

TORCH_PATTERNS = ["*.bin", "*.pth", "*.pt"]
#: What a checkpoint or a workspace may consist of; everything else on a hub (pictures, other frameworks' weights) stays there.
SAFE_PATTERNS = [
    *("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "model_repository/**", "triton_models/**"),
]
CONFIG_PATTERNS = ["config.json", "generation_config.json", "params.json", "model_repository/*/1/weights/config.ini"]
#: The same model again for other programs.
OTHER_FOLDERS = ["original/*", "onnx/*", "openvino/*", "coreml/*", "gguf/*"]
CONNECT_TIMEOUT_S = 10.0
MAX_REASON = 240
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def local_model_path(
    model_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    download_dir: str | os.PathLike[str] | None = None,
    config_only: bool = False,
) -> Path:
    """The folder itself, or the downloaded snapshot of a hub id. `download_dir`: the hub client's cache; None: its own choice.

    `config_only`: without weights and tokenizer.

    Raises CheckpointError: neither a path nor an id, or the download failed.
    """
    path = Path(model_path)
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"revision is {revision!r}, but {path} is a local path; leave it out or give a hub id")
        return path
    text = os.fspath(model_path)
    if not _ID.fullmatch(text):
        raise CheckpointError(
            f"{text}: is no folder, and no hub id such as owner/name either; give a model's folder or its hub id"
        )
    return _download(text, revision, download_dir, CONFIG_PATTERNS if config_only else None)


def _download(
    repo_id: str, revision: str | None, download_dir: str | os.PathLike[str] | None, patterns: list[str] | None
) -> Path:
    """`patterns` None: what a checkpoint needs, weights in one format."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def snapshot(patterns: list[str], *, only_local: bool) -> Path:
        cache = None if download_dir is None else Path(download_dir)
        found = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache,
            allow_patterns=patterns,
            ignore_patterns=OTHER_FOLDERS,
            local_files_only=only_local,
        )
        return Path(found)

    try:
        try:
            info = HfApi().model_info(repo_id, revision=revision, timeout=CONNECT_TIMEOUT_S)
        except HfHubHTTPError:
            raise  # the hub answered
        except Exception as error:  # noqa: BLE001  no connection: its client passes on what its HTTP library raises
            logger.info("the hub cannot be reached (%s); looking for %s in the download folder", error, repo_id)
            try:
                return snapshot(patterns or SAFE_PATTERNS, only_local=True)
            except OSError:
                raise error from None
        return snapshot(patterns or _wanted([sibling.rfilename for sibling in info.siblings or []]), only_local=False)
    except Exception as error:  # noqa: BLE001  as above
        raise CheckpointError(
            f"{repo_id}: is no local folder, and as a hub id it could not be downloaded: {_reason(error, revision)}"
        ) from None


def _wanted(names: list[str]) -> list[str]:
    """Without the same weights again in torch's own format."""
    has_safetensors = any(name.endswith(".safetensors") for name in names)
    return SAFE_PATTERNS if has_safetensors else SAFE_PATTERNS + TORCH_PATTERNS


def _reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too
        return "its owner grants access there by name; ask for it, then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub knows no such model, or shows it to others only (set HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:MAX_REASON] + "..." if len(text) > MAX_REASON else text
