"""What a model has to be for its curvature to be measured."""

import torch
from torch import nn

from ..estimators.hooks import several_devices


def check_model(model: object, optimizer: str) -> None:
    """Refuse what an optimizer of this name cannot measure.

    Raises:
        TypeError: it is no module, as where an optimizer of torch would be given parameters.
        ValueError: its batches are spread over several devices or processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{optimizer} takes the model, whose layers it has to see, not a {type(model).__name__}: "
            f"{optimizer}(model, ...), or {optimizer}(model, parameters, ...) to train a part of it"
        )
    several = isinstance(model, nn.DataParallel) and len(model.device_ids) > 1
    group = torch.distributed
    if several or (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        raise several_devices(optimizer)
