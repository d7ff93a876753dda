"""The little of H.264 that the packer and the decoder look at themselves."""

from collections.abc import Iterator


def unit_headers(packet: bytes, prefix: int) -> Iterator[int]:
    """First bytes of a packet's units, in order: 1 bit zero, 2 bits nal_ref_idc, 5 bits the kind.

    In MP4 a packet is a row of units, each a length of `prefix` bytes and a payload.
    """
    place = 0
    while place + prefix < len(packet):
        yield packet[place + prefix]
        place += prefix + int.from_bytes(packet[place : place + prefix], "big")
