"""P to bytes and back (docs/wire-format.md)."""

from .compression import is_exact
from .names import check_names, in_names
from .packed import Packed
from .payload import FORMAT_VERSION, PayloadError, decode, encode, pack_layers
from .tensors import own_copies

__all__ = [
    "FORMAT_VERSION",
    "Packed",
    "PayloadError",
    "check_names",
    "decode",
    "encode",
    "in_names",
    "is_exact",
    "own_copies",
    "pack_layers",
]
