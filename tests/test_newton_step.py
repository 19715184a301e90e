"""I1 with the exact Hessian: a round of K = 1 is the (damped) Newton step of the global loss.

Logistic and softmax regression, clients of different data, through the real strategy and ClientApp;
the oracle is torch.func on all data together.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedpm_flwr.curvature import from_matrix, to_matrix
from fedpm_flwr.optim import Newton
from fedpm_flwr.strategy import FedPM

from .apps import federate, full_batch_client
from .helpers import relative_error

SIZES = [12, 40, 25, 90]
IN = 5


def client_data(classes: int, partition: int) -> tuple[Tensor, Tensor]:
    """Clients of unequal size, inputs of different mean and scale, and noisy labels."""
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(SIZES[partition], IN, dtype=torch.float64, generator=generator) * (partition + 1) - partition
    noise = torch.randn(SIZES[partition], IN, dtype=torch.float64, generator=generator)
    return x, (x + 2 * (partition + 1) * noise)[:, :classes].argmax(dim=1)


def logistic_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs[:, 0], labels.double())


def make_model(outputs: int) -> nn.Linear:
    torch.manual_seed(3)
    model = nn.Linear(IN, outputs).double()
    nn.init.normal_(model.weight, std=0.01)  # so near to 0 that full Newton steps do not overshoot
    return model


def joint(state: dict[str, Tensor]) -> Tensor:
    return to_matrix([state["weight"], state["bias"]])


Problem = tuple[int, int, Callable[[Tensor, Tensor], Tensor], float]
PROBLEMS: dict[str, Problem] = {
    "logistic": (2, 1, logistic_loss, 0.0),
    "softmax": (3, 3, F.cross_entropy, 1e-3),  # singular without damping: all classes may be raised alike
}


def newton_step(problem: Problem) -> Tensor:
    """[W | b] after the damped Newton step of the loss over all data, by torch.func."""
    classes, outputs, loss, damping = problem
    batches = [client_data(classes, i) for i in range(len(SIZES))]
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    model = make_model(outputs)
    start = joint(dict(model.state_dict()))

    def objective(matrix: Tensor) -> Tensor:
        weight, bias = from_matrix(matrix, [model.weight.shape, model.bias.shape])
        return loss(F.linear(x, weight, bias), y)

    gradient = torch.func.grad(objective)(start).flatten()
    hessian: Tensor = torch.func.hessian(objective)(start).reshape(len(gradient), -1)
    damped = hessian + damping * torch.eye(len(gradient)).double()
    step: Tensor = torch.linalg.solve(damped, gradient)
    return start - step.reshape(start.shape)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])  # equal for these losses
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_one_round_is_the_newton_step_of_the_global_loss(problem: Problem, matrix: str) -> None:
    classes, outputs, loss, damping = problem
    optimizer = partial(Newton, matrix=matrix, damping=damping)
    client = full_batch_client(partial(client_data, classes), partial(make_model, outputs), loss, optimizer)
    result = federate(client, FedPM(codec="triangle-float64"), make_model(outputs), len(SIZES))
    assert relative_error(joint(result.arrays.to_torch_state_dict()), newton_step(problem)) < 1e-10


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_averaging_the_same_local_steps_is_not(problem: Problem) -> None:
    classes, outputs, loss, damping = problem
    client = full_batch_client(
        partial(client_data, classes), partial(make_model, outputs), loss, partial(Newton, damping=damping)
    )
    result = federate(client, FedAvg(), make_model(outputs), len(SIZES))
    assert relative_error(joint(result.arrays.to_torch_state_dict()), newton_step(problem)) > 0.1


def test_rounds_converge_quadratically_to_the_global_optimum() -> None:
    """Errors go down to machine precision within eight rounds, each round about squaring them at the end."""
    classes, outputs, loss, _ = PROBLEMS["logistic"]
    client = full_batch_client(partial(client_data, classes), partial(make_model, outputs), loss, Newton)
    models = [
        joint(
            federate(
                client, FedPM(codec="triangle-float64"), make_model(outputs), len(SIZES), rounds=rounds
            ).arrays.to_torch_state_dict()
        )
        for rounds in (3, 4, 5, 6, 10)
    ]
    errors = [relative_error(model, models[-1]) for model in models[:-1]]
    assert errors[-1] < 1e-12
    assert errors[1] < 10 * errors[0] ** 2
