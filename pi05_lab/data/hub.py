"""Data sets of the Hugging Face Hub, cached as LeRobot's."""

from __future__ import annotations

from pathlib import Path

from pi05_lab.data.lerobot_format import DatasetError
from pi05_ros.policy.checkpoint import HUB_ID


def dataset_folder(root: str | Path) -> Path:
    """The local folder of a data set; a Hugging Face id that is not cached is downloaded.

    Raises:
        DatasetError: neither a folder nor an id that can be fetched.
    """
    folder = Path(root).expanduser()
    match = HUB_ID.fullmatch(str(root))
    if folder.exists() or match is None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(match["repo"], repo_type="dataset", revision=match["revision"])
    except Exception as error:  # the hub's own, those of its HTTP client, OSError
        reason = str(error).strip().splitlines()[0]
        raise DatasetError(
            f"{root} is not a folder here, and as a Hugging Face data set it is neither cached nor "
            f"can it be fetched ({type(error).__name__}: {reason}). Check its spelling and the "
            "connection, or log in where it is gated"
        ) from None
    return Path(found)
