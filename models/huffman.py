"""Bytes that do not repeat in sequences, by how often each comes: the Huffman code of DEFLATE, without its dictionary.

Reads and writes bytes in memory.
Never unpacks to more than is asked for, whatever the code says; what is damaged is refused with DeltaError.
Source: RFC 1951.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from models.errors import DeltaError

_REFUSED = "the sender's software or its base bundle differs from this one's; compare the versions"


def encode(symbols: NDArray[np.uint8]) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(symbols.tobytes()) + coder.flush()


def decode(code: bytes, count: int) -> tuple[NDArray[np.uint8], bytes]:
    """Exactly `count` symbols, and what follows their code. Raises DeltaError where there are more or fewer."""
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        symbols = decoder.decompress(code, count + 1)
    except zlib.error as error:
        raise DeltaError(f"the delta's code is damaged: {error}", advice=_REFUSED) from error
    if len(symbols) != count or not decoder.eof:
        raise DeltaError("the delta holds more or fewer values than the plan says", advice=_REFUSED)
    return np.frombuffer(symbols, np.uint8), decoder.unused_data
