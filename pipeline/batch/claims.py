"""Claims of slides between processes that share an output folder."""

from pathlib import Path

from filelock import FileLock, Timeout


def claim(output: Path, slide_id: str) -> FileLock | None:
    """Claim a slide for this process.

    The claim is an operating-system lock: it ends with the process, however that dies.

    Returns:
        The lock to release when the slide is finished, or None when another process holds it.
    """
    lock = FileLock(lock_folder(output) / f"{slide_id}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def lock_folder(output: Path) -> Path:
    """Where the locks of an output folder are; made if need be."""
    folder = output / ".locks"
    folder.mkdir(exist_ok=True)
    return folder
