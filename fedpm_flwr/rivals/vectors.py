"""The server's θ as the vector [d] that the clients' ``Objective`` has."""

from collections.abc import Mapping

from torch import Tensor

from ..curvature import from_matrix, matrix_shape, to_matrix


def to_vector(state: Mapping[str, Tensor]) -> Tensor:
    """The floating-point entries of a model's state as one vector [d], laid out as ``Objective.theta``.

    They must be the model's trainable parameters, each once, in the order of ``model.parameters()``: so
    it is in models without frozen or tied parameters and without floating-point buffers.
    """
    return to_matrix(_floating(state)).flatten()


def from_vector(vector: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``to_vector``: the state with these numbers, in its own dtypes; what is no float is as it was."""
    shapes = [tensor.shape for tensor in _floating(state)]
    parts = iter(from_matrix(vector.reshape(matrix_shape(shapes)), shapes))
    return {
        key: next(parts).to(old.dtype) if old.is_floating_point() else old.clone() for key, old in state.items()
    }


def _floating(state: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor for tensor in state.values() if tensor.is_floating_point()]
