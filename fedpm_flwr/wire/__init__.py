"""P to bytes and back (docs/wire-format.md)."""

from .codecs import CODECS, Codec, as_decoded, get_codec
from .payload import FORMAT_VERSION, PayloadError, decode, encode

__all__ = ["CODECS", "FORMAT_VERSION", "Codec", "PayloadError", "as_decoded", "decode", "encode", "get_codec"]
