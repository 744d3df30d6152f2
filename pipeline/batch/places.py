"""Where a job works: on one device, on several of this machine (`--devices`), on those of a Ray cluster (`--ray`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...errors import LongslideError
from .workers import Worker, local_workers


def check_places(device: str | None, devices: str | None, ray: str | None, option: str = "--device") -> None:
    """Where to work is said once.

    Args:
        device: One device, as the user says it by `option`; None or `auto` says nothing.
        devices: As `--devices` says it.
        ray: As `--ray` says it.
        option: What one device is given by, for the message.

    Raises:
        LongslideError: It is said twice.
    """
    places = {option: None if device == "auto" else device, "--devices": devices, "--ray": ray}
    given = [name for name, place in places.items() if place is not None]
    if len(given) > 1:
        raise LongslideError(f"{given[0]} and {given[1]}: give only one of the two")


@contextmanager
def workers_on(devices: str | None, ray: str | None, output: Path) -> Iterator[Sequence[Worker]]:
    """The workers that `--devices` or `--ray` stand for; none where neither is given.

    Raises:
        LongslideError: There are no such devices, or there is no such cluster.
    """
    if ray is not None:
        from .ray_cluster import ray_workers

        with ray_workers(ray, output) as workers:
            yield workers
    elif devices is not None:
        from ..embed.tile_embedding import resolve_devices

        yield local_workers(resolve_devices(devices))
    else:
        yield ()
