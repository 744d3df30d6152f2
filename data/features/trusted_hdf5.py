"""What an HDF5 file from outside may hold: its own numbers and texts, and no more of them than the file has bytes for."""

from pathlib import Path

import h5py

from ...errors import LongslideError

MOST_OBJECTS = 10_000
"""Groups and datasets of a file that are looked at."""

MOST_COMPRESSED = 1100
"""Bytes that a compressed byte may stand for; deflate reaches 1032, of nothing but zeros."""


def check_file(path: Path, file: h5py.File) -> None:
    """Refuse a file that refers to other files: reading it would show what is in those.

    Raises:
        LongslideError: An external link, a dataset stored outside or put together from other files; or far too many objects.
    """
    seen: set[int] = set()
    groups: list[h5py.Group] = [file]
    while groups:
        group = groups.pop()
        for name in group:
            if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
                raise LongslideError(f"{path}: `{name}` is a link into another file, which is not followed; copy it in")
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                continue
            seen.add(address)
            if len(seen) > MOST_OBJECTS:
                raise LongslideError(
                    f"{path}: not a feature file: it has more than {MOST_OBJECTS:,} groups and datasets"
                )
            if isinstance(item, h5py.Group):
                groups.append(item)
            elif isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
                raise LongslideError(
                    f"{path}: the numbers of `{name}` lie in another file, which is not read; copy them in"
                )
            _check_attributes(path, item)
    _check_attributes(path, file)


def check_numbers(path: Path, dataset: object, name: str) -> None:
    """Refuse a dataset that is not plain numbers, or declares more of them than the file holds.

    Raises:
        LongslideError: It is of another type, or was never written, in part or whole.
    """
    if not isinstance(dataset, h5py.Dataset):
        raise LongslideError(f"{path}: `{name}` is not a table of numbers")
    if dataset.dtype.kind not in "fiu":
        raise LongslideError(f"{path}: `{name}` is of the type {dataset.dtype}, and not plain numbers")
    stored = dataset.id.get_storage_size()
    compressed = dataset.id.get_create_plist().get_nfilters() > 0
    if dataset.nbytes > stored * (MOST_COMPRESSED if compressed else 1) or stored > path.stat().st_size:
        raise LongslideError(
            f"{path}: `{name}` declares {dataset.nbytes:,} bytes, of which the file holds {stored:,}: not written whole; "
            "delete it and embed the slide again"
        )


def _check_attributes(path: Path, item: h5py.Group | h5py.Dataset) -> None:
    for name in item.attrs:
        kind = item.attrs.get_id(name).dtype
        if kind.kind not in "fiubSU" and h5py.check_string_dtype(kind) is None and h5py.check_enum_dtype(kind) is None:
            raise LongslideError(
                f"{path}: the attribute {name!r} is of the type {kind}, and not a plain number or text"
            )
