"""P to bytes and back (docs/wire-format.md)."""

from .codecs import CODECS, Codec, as_decoded, get_codec
from .payload import FORMAT_VERSION, PayloadError, decode, encode
from .tensors import own_copies

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "Codec",
    "PayloadError",
    "as_decoded",
    "decode",
    "encode",
    "get_codec",
    "own_copies",
]
