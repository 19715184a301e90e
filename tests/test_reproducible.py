"""Same seed, same result: whatever the node IDs, whatever order replies arrive in."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.inline import InlineGrid, task_identity
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.strategy import FedPM

from .apps import federate, regression_client


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def data(partition: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    return torch.randn(7 + partition, 3, generator=generator), torch.randn(7 + partition, 2, generator=generator)


def run(
    make_strategy: Callable[[], Strategy], node_seed: int, seed: int, answers: bool = True
) -> tuple[dict[str, Tensor], list[int]]:
    """The final model, and the partitions that trained, in order."""
    app, trained = ClientApp(), list[int]()
    inner = regression_client(data, make_model, lr=0.5, damping=0.1)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trained.append(messages.partition_of(context)[0])
        return inner(message, context)

    if answers:

        @app.query(messages.PARTITION_ACTION)
        def partition(message: Message, context: Context) -> Message:
            return messages.partition_reply(message, context)

    def wrap(grid: Grid) -> Grid:
        return PartitionOrderedGrid(grid, seed)

    result = federate(app, make_strategy(), make_model(), 9, rounds=4, wrap=wrap, seed=node_seed)
    return dict(result.arrays.to_torch_state_dict()), trained


@pytest.mark.parametrize("strategy", [FedPM, FedAvg])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_bit_for_bit(strategy: type[FedAvg], fraction: float) -> None:
    first, trained = run(lambda: strategy(fraction_train=fraction), node_seed=1, seed=5)
    for node_seed in (2, 3):
        again, trained_again = run(lambda: strategy(fraction_train=fraction), node_seed, seed=5)
        assert trained_again == trained
        for key, value in first.items():
            assert torch.equal(again[key], value)


def test_sampling_changes_with_the_seed_and_from_round_to_round() -> None:
    _, trained = run(lambda: FedPM(fraction_train=0.5), node_seed=1, seed=5)
    _, other = run(lambda: FedPM(fraction_train=0.5), node_seed=1, seed=6)
    assert trained != other
    rounds = {frozenset(trained[i : i + 4]) for i in range(0, 16, 4)}
    assert len(rounds) > 1


def test_clients_that_do_not_say_their_partition_still_train(caplog: pytest.LogCaptureFixture) -> None:
    state, trained = run(FedPM, node_seed=1, seed=5, answers=False)
    assert caplog.text.count("9 nodes do not say their partition") == 1
    assert sorted(trained) == sorted(list(range(9)) * 4)
    assert set(state) == {"weight", "bias"}


def test_a_node_that_does_not_answer_at_first_is_asked_again() -> None:
    app, asked = ClientApp(), Counter[int]()
    inner = regression_client(data, make_model, lr=0.5, damping=0.1)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return inner(message, context)

    @app.query(messages.PARTITION_ACTION)
    def partition(message: Message, context: Context) -> Message:
        number = messages.partition_of(context)[0]
        asked[number] += 1
        if number == 2 and asked[number] == 1:
            raise OSError("not now")
        return messages.partition_reply(message, context)

    federate(app, FedPM(), make_model(), 4, wrap=lambda grid: PartitionOrderedGrid(grid, 0))
    assert asked == {0: 1, 1: 1, 2: 2, 3: 1}


def telling(tell: Callable[[int], int]) -> ClientApp:
    """Answers only the question for its partition, by what ``tell`` makes of it."""
    app = ClientApp()

    @app.query(messages.PARTITION_ACTION)
    def partition(message: Message, context: Context) -> Message:
        context.node_config[messages.PARTITION_ID] = tell(messages.partition_of(context)[0])
        return messages.partition_reply(message, context)

    return app


def test_nodes_that_come_back_under_new_ids_are_not_two_of_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    with task_identity(1):
        first, second = (InlineGrid(telling(lambda own: own), 3, {}, seed=seed) for seed in (1, 2))
        grid = PartitionOrderedGrid(first, 0)
        before = grid.get_node_ids()
        grid.inner = second
        after = grid.get_node_ids()
    assert not set(before) & set(after)
    assert [grid.partition_of(node) for node in after] == [0, 1, 2]
    assert "several nodes" not in caplog.text


def test_nodes_with_the_same_partition_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with task_identity(1):
        PartitionOrderedGrid(InlineGrid(telling(lambda own: own // 2), 3, {}, seed=1), 0).get_node_ids()
    assert "several nodes hold the same partition" in caplog.text
