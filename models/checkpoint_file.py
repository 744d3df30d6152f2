"""Weights as files: from the hub or the disk, read without unpickling, held against what a model wants."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LongslideError, refuse_newer

SCHEMA = 1
"""Version of what Longslide's own checkpoints hold under `longslide`."""


def download(
    what: str, hub_id: str | None, names: Sequence[str], *, gated: bool, option: str, revision: str | None = None
) -> tuple[Path, str]:
    """Take a weights file from the Hugging Face hub, or from its cache (with HF_HUB_OFFLINE, only from there).

    Args:
        what: What the weights are for, for the messages.
        hub_id: Repository on the hub, or None if there is none.
        names: File names to try, in this order.
        gated: Whether the hub asks for an account that has accepted the terms.
        option: The command line's option for local weights, for the messages.
        revision: Commit, branch or tag; the newest of the main branch by default.

    Returns:
        The file, and `hf:<repository>@<revision>`.

    Raises:
        LongslideError: The weights are unavailable; says which page to accept, what to set, or what to give instead.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    if hub_id is None:
        raise LongslideError(f"{what} has no weights on the hub: give them with {option}.")
    page = f"https://huggingface.co/{hub_id}"
    local = f"or give the weights with {option}"
    unreachable: Exception | None = None
    for name in names:
        try:  # a hub that did not answer once is not asked again: it takes 20 seconds
            with _errors_alone():
                file = Path(hf_hub_download(hub_id, name, revision=revision, local_files_only=unreachable is not None))
        except RepositoryNotFoundError as error:  # also GatedRepoError, and a private page without a token
            raise LongslideError(
                f"{what}: no access to its weights. Accept the terms at {page} "
                f"and set HF_TOKEN to a token of that account, {local}."
            ) from error
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error
        except EntryNotFoundError:
            continue
        except Exception as error:  # of a broken connection: requests' are OSErrors, those of httpx are not
            unreachable = unreachable or error
        else:
            return file, f"hf:{hub_id}@{file.parent.name}"
    if unreachable is None:
        raise LongslideError(f"{what}: {page} has no {' or '.join(names)}; {local[3:]}.")
    terms = f"; its terms must be accepted at {page} and HF_TOKEN set" if gated else f" ({page})"
    cause = unreachable.__cause__ or unreachable
    reason = (str(cause).strip() or repr(cause)).split("\n")[0].split(". ")[0][:200]
    raise LongslideError(
        f"{what}: the weights are neither in the hub's cache nor to be reached{terms}: {reason}. Connect "
        f"once (unset HF_HUB_OFFLINE), point HF_HOME to a cache that has them, {local}."
    ) from unreachable


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Leave out what huggingface_hub warns of, two lines for each of its tries; its progress bars stay.

    A user who asked for more by HF_HUB_VERBOSITY or HF_DEBUG gets it.
    """
    from huggingface_hub.utils import logging as hub

    before = hub.get_verbosity()
    if before == logging.WARNING:
        hub.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub.set_verbosity(before)


def read_checkpoint(file: Path) -> Any:
    """Read a file of tensors: safetensors by its suffix, else what `torch.load` takes with `weights_only=True`.

    Raises:
        LongslideError: The file is broken, or holds more than tensors and plain containers.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise all kinds of errors on a broken file
        reason = str(error).strip().split("\n")[0].split(". ")[0][:200]
        raise LongslideError(
            f"{file}: not a readable checkpoint of tensors alone (safetensors, or a state dict that torch.load takes "
            f"with weights_only=True): {reason}"
        ) from error


def read_description(file: Path) -> dict[str, Any] | None:
    """What a checkpoint of `longslide fit` holds under `longslide`, and its weights under `state_dict`.

    Returns:
        The description, its `kind` among it; None for a checkpoint of other software.

    Raises:
        LongslideError: No such file, a truncated one, one with pickled code, or one of a newer Longslide.
    """
    if not file.is_file():
        raise LongslideError(f"{file}: no such checkpoint")
    content = read_checkpoint(file)
    description = content.get("longslide") if isinstance(content, dict) else None
    if not isinstance(description, dict) or "schema" not in description or "state_dict" not in content:
        return None
    refuse_newer(file, description["schema"], SCHEMA)
    return description | {"state_dict": content["state_dict"]}


def digest(file: Path) -> str:
    """`sha256:` and the first 16 hex digits of the SHA-256 of a file."""
    with file.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()[:16]}"


def digest_of_tensors(module: nn.Module) -> str:
    """`sha256:` and the first 16 hex digits of the SHA-256 over names, types, shapes and bytes of a module's tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{total.hexdigest()[:16]}"


def check_tensors(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Hold the tensors of a checkpoint against those a model wants.

    Args:
        state: Name -> tensor, of the checkpoint.
        wanted: Name -> tensor, of the model.
        what: Which checkpoint does not fit which model, for the message.

    Raises:
        LongslideError: Some are missing, unexpected or of the wrong shape; they are named after `what`.
    """
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    problems = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "wrong shape": wrong,
    }
    found = [f"{problem}: {_some(names)}" for problem, names in problems.items() if names]
    if found:
        raise LongslideError(f"{what}; {'; '.join(found)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
