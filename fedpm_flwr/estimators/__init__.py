"""How a client measures P."""

from .input_covariance import InputCovariance

__all__ = ["InputCovariance"]
