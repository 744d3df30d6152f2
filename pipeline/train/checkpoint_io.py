"""How training writes its checkpoints and reads them to go on."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ...data.whole_file import whole_file
from ...errors import LongslideError
from ...models.checkpoint_file import read_checkpoint

Location = str | os.PathLike[str]


class WholeFileCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear under their names only when they are complete, so that a killed run keeps the one before.

    Lightning's own are written into the temporary folder of the machine and moved, which across file systems is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Location, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            LongslideError: It cannot be written; the one before is as it was.
        """
        with whole_file(Path(path), "--run") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch's writer closes its archive after whatever has ended it, and fails at that.
                before = error.__context__
                if isinstance(before, KeyboardInterrupt | OSError):
                    raise before from None
                raise OSError(None, f"torch: {str(error).splitlines()[0]}") from error

    def load_checkpoint(
        self,
        path: Location,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint to go on from, which holds nothing but tensors and plain types.

        Raises:
            LongslideError: It is unreadable.
        """
        try:
            content: dict[str, Any] = read_checkpoint(Path(path))
        except LongslideError as error:
            raise LongslideError(f"{error}; delete it to start the run again") from error
        return content
