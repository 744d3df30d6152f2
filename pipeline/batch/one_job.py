"""An output folder has results of one kind: jobs with other settings do not work there at the same time."""

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import LongslideError
from .claims import Claim, ClaimedError, lock_folder, take


@contextmanager
def one_job(output: Path, made_with: Mapping[str, Any]) -> Iterator[None]:
    """Work in a folder; any number of processes with these settings may.

    Args:
        output: The folder.
        made_with: What results depend on. Jobs of other kinds may have other names for theirs: those in common count.

    Raises:
        LongslideError: A process that works there has other settings.
    """
    settings = json.dumps(made_with, sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    folder = lock_folder(output)
    own = take(
        folder / f".job-{digest}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.lock",
        {"made_with": made_with},
    )
    try:
        for path in folder.glob(".job-*.lock"):
            if not path.name.startswith(f".job-{digest}-"):  # else nothing to read: there may be hundreds of them
                _refuse_other(path, own, made_with, output)
        yield
    finally:
        own.release()


def _refuse_other(path: Path, own: Claim, made_with: Mapping[str, Any], output: Path) -> None:
    holder = _holder(path)
    if holder is None or not holder.record.get("since", 0) <= own.since:  # one that began later refuses itself
        return
    theirs = holder.record.get("made_with", {})
    ours = json.loads(json.dumps(made_with))
    ways = [
        f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if theirs.get(name, ours[name]) != ours[name]
    ]
    if ways:
        raise LongslideError(
            f"{output}: another job is at work there with other settings ({'; '.join(ways)}; {holder.who}); choose "
            "another --output, or wait until it has ended"
        )


def _holder(path: Path) -> ClaimedError | None:
    """Who holds a claim; None if its process has died."""
    for _ in range(20):
        try:
            take(path).release()
            return None
        except ClaimedError as holder:
            if holder.record:
                return holder
            time.sleep(0.1)  # it is about to write who it is
    return None
