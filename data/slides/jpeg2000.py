"""What of a damaged JPEG 2000 stream can be told without a checksum, which it has not: decoders pass over most of it."""

import re
import struct

_SOC_SIZ, _SOT, _SOD, _EOC = b"\xff\x4f\xff\x51", b"\xff\x90", b"\xff\x93", b"\xff\xd9"
_BOX = b"\0\0\0\x0cjP  "  # begins a stream in boxes (JP2)
# Coders never write two bytes above 0xFF8F but as markers, of which two stand between packets.
_NO_DATA = re.compile(rb"\xff[\x90\x93-\xff]")


def jpeg2000_size(stream: bytes) -> tuple[int, int] | None:
    """(width, height) that a stream declares; None if it is none."""
    start = _start(stream)
    if start is None or len(stream) < start + 24:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", stream, start + 8)
    return right - left, bottom - top


def jpeg2000_damage(stream: bytes) -> str:
    """Why the bytes cannot be what an encoder wrote; empty if nothing is against it.

    The stream must be a chain of tile-parts, each as long as it says, that ends in an end marker, with nothing in their data
    that a coder never writes. What follows the end does not matter. See ISO/IEC 15444-1, annexes A and B.10.1.
    """
    at = _start(stream)
    if at is None:
        return "no JPEG 2000 stream"
    at += 2
    try:
        while (marker := stream[at : at + 2]) != _SOT:  # the main header
            if marker[:1] != b"\xff":
                return "a broken header"
            at += 2 + struct.unpack_from(">H", stream, at + 2)[0]
        while (marker := stream[at : at + 2]) == _SOT:
            length = struct.unpack_from(">I", stream, at + 6)[0]
            part = stream.rfind(_EOC) if length == 0 else at + length  # 0: it reaches to the end
            data = at
            while (marker := stream[data : data + 2]) != _SOD:
                if marker[:1] != b"\xff":
                    return "a broken header of a tile-part"
                data += 2 + struct.unpack_from(">H", stream, data + 2)[0]
            if not data + 2 <= part <= len(stream):
                return "a tile-part that does not end in it"
            if _NO_DATA.search(stream, data + 2, part):
                return "bytes that no encoder writes"
            at = part
    except struct.error:
        return "an end before its end"
    return "" if marker == _EOC else "no end where it must be"


def _start(stream: bytes) -> int | None:
    """First byte of the codestream."""
    if stream.startswith(_SOC_SIZ):
        return 0
    start = stream.find(_SOC_SIZ, 0, 4096) if stream.startswith(_BOX) else -1
    return start if start >= 0 else None
