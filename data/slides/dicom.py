"""DICOM files: which slide (series) each belongs to, from its header alone."""

import re
import struct
from pathlib import Path

from ...errors import LongslideError
from ..regular_file import check_regular

SERIES_INSTANCE_UID = (0x0020, 0x000E)

_CODECS = {
    "1.2.840.10008.1.2.1.99": "deflate",
    "1.2.840.10008.1.2.4.57": "lossless JPEG",
    "1.2.840.10008.1.2.4.70": "lossless JPEG",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS",
    "1.2.840.10008.1.2.4.110": "JPEG XL",
    "1.2.840.10008.1.2.4.111": "JPEG XL",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.4.201": "high-throughput JPEG 2000",
    "1.2.840.10008.1.2.4.202": "high-throughput JPEG 2000",
    "1.2.840.10008.1.2.4.203": "high-throughput JPEG 2000",
    "1.2.840.10008.1.2.5": "run lengths (RLE)",
}  # transfer syntaxes of DICOM PS3.6, annex A

_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_EXPLICIT_BIG_ENDIAN, _IMPLICIT, _DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"
_HEADER_BYTES = 2**20  # the series stands near the beginning: tags ascend


def unread_codec(error: object) -> str:
    """What to say where OpenSlide's error is a codec of DICOM that it does not read; empty if it is another error."""
    found = re.search(r"[Uu]nsupported transfer syntax ([\d.]+)", str(error))
    if found is None:
        return ""
    syntax = found.group(1).rstrip(".")
    codec = _CODECS.get(syntax, f"the transfer syntax {syntax}")
    return (
        f"its pixels are compressed by {codec}, which OpenSlide does not read in DICOM; convert all files of the slide, for "
        "instance by `gdcmconv --raw IN OUT`"
    )


def series_of(path: Path) -> str | None:
    """The SeriesInstanceUID of a DICOM file; None if it is no DICOM file, or cannot be read or found.

    The files of one series are the levels, the label and the concatenated parts of one slide.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except (OSError, LongslideError):
        return None
    if header[128:132] != b"DICM":
        return None
    position, syntax = 132, ""
    try:
        while True:
            group, element = struct.unpack_from("<HH", header, position)
            implicit = group != 2 and syntax == _IMPLICIT
            kind = header[position + 4 : position + 6]
            if implicit:
                length, start = struct.unpack_from("<I", header, position + 4)[0], position + 8
            elif kind in _LONG:
                length, start = struct.unpack_from("<I", header, position + 8)[0], position + 12
            else:
                length, start = struct.unpack_from("<H", header, position + 6)[0], position + 8
            value = header[start : start + length]
            if (group, element) == (0x0002, 0x0010):
                syntax = value.decode("ascii", "replace").rstrip("\0 ")
            if group != 2 and syntax in (_EXPLICIT_BIG_ENDIAN, _DEFLATED):
                return None
            if (group, element) == SERIES_INSTANCE_UID:
                return value.decode("ascii", "replace").rstrip("\0 ") or None
            if (group, element) > SERIES_INSTANCE_UID:
                return None
            if length == 0xFFFFFFFF:  # a sequence of unknown length ends at its delimiter
                end = header.find(b"\xfe\xff\xdd\xe0", start)
                if end < 0:
                    return None
                position = end + 8
            else:
                position = start + length
    except struct.error:  # the header ends here
        return None
