"""What aggregation takes: the ServerApp's memory by the number of clients, and its time beside the least possible.

    python -m benchmarks.server [--clients 10,100,1000] [--methods fedpm,fedpm:auto,fedavg]

One round of the strategy's own ``start`` in a process of its own, with real replies of a model of 10 MB, read from
disk one after another and parsed by Flower as they are pulled. fedpm: FOOF's matrices in full, or by the codec
after the colon; fedavg: Flower's own, which gets the same replies as fedpm:auto.

Columns: peak_mb, the process's largest resident memory, Python and PyTorch included; times_first, as a multiple
of that with the fewest clients; seconds a client, all but reading and parsing; floor_seconds, for the same work:
a client's bytes and θ read, and the sums read and written once, by this machine's memory bandwidth; and
Pᵢ(θᵢ − θ), the sum of the Pᵢ, the Cholesky factor that tells whether Pᵢ is positive definite, and a client's share
of the last solve, by its rate of matrix products in float64 (both measured here); times_floor; times_fedavg.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedpm_flwr import messages
from fedpm_flwr.config import ConfigError, check_codec
from fedpm_flwr.curvature import LowRank
from fedpm_flwr.inline import InlineGrid, task_identity
from fedpm_flwr.optim import FOOF
from fedpm_flwr.strategy import FedPM
from fedpm_flwr.wire import decode

from .arguments import make_parser, whole_numbers
from .machine import memory_bandwidth, peak_bytes, product_rate
from .table import Row, publish, rounded, with_times_fedavg

FULL, AUTO = "triangle-float32", "auto"
_SIDE, _OUTPUTS, _BATCH = 1024, 512, 256
_VARIANTS = 4
"""Different replies, that the clients share among them."""
_MB = 1e6


def make_model() -> nn.Sequential:
    """2.6 million parameters, 10.5 MB."""
    torch.manual_seed(0)
    layers = (nn.Linear(_SIDE, _SIDE), nn.ReLU(), nn.Linear(_SIDE, _SIDE), nn.ReLU(), nn.Linear(_SIDE, _OUTPUTS))
    return nn.Sequential(*layers)


class Replies(InlineGrid):
    """As many nodes as wanted, whose replies lie ready in files."""

    def __init__(self, folder: Path, clients: int) -> None:
        super().__init__(ClientApp(), clients, {}, seed=0)
        self._files = sorted(folder.iterdir())
        self._nodes: dict[str, int] = {}
        self._file_of: dict[str, Path] = {}
        self.seconds = 0.0
        """Spent in reading and parsing."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        keys = []
        for message in messages:
            key, number = f"message-{len(self._nodes)}", len(self._nodes)
            self._file_of[key] = self._files[number % len(self._files)]
            self._nodes[key] = message.metadata.dst_node_id
            keys.append(key)
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        start = time.perf_counter()
        replies: list[Message] = []
        for key in message_ids:
            document = ProtoMessage.FromString(self._file_of[key].read_bytes())
            document.metadata.reply_to_message_id, document.metadata.src_node_id = key, self._nodes[key]
            replies.append(message_from_proto(document))
            del document
        self.seconds += time.perf_counter() - start
        return replies


@dataclass(frozen=True)
class Work:
    """What a reply is, and so the least work that it is to the server."""

    bytes: int
    ranks: tuple[int, ...]
    """Of each layer's curvature; a full matrix has that of its side."""

    def bytes_moved(self, method: str) -> int:
        """The reply and θ, read; in float64 Σ wᵢPᵢ(θᵢ − θ), and Σ wᵢPᵢ if that is a matrix, read and written."""
        layers = _linear_layers()
        parameters = sum(p.numel() for layer in layers for p in layer.parameters())
        if method == "fedavg":  # sums in θ's own dtype
            return self.bytes + 2 * 4 * parameters
        matrices = sum((layer.in_features + 1) ** 2 for layer in layers)
        return self.bytes + 4 * parameters + 2 * 8 * (parameters + matrices)

    def operations(self, method: str, clients: int) -> float:
        """Of a client: the products, the check, and its share of the solve, which is the round's."""
        if method == "fedavg":
            return 0.0
        total = 0.0
        for layer, rank in zip(_linear_layers(), self.ranks, strict=True):
            rows, side = layer.out_features, layer.in_features + 1
            solve = side**3 / 3 + 2 * rows * side**2
            own = 2 * rows * side**2 + side**3 / 3 if rank == side else (4 * rows + 2 * side) * side * rank
            total += own + solve / clients
        return total


@dataclass(frozen=True)
class Measured:
    """One run: the round's seconds without reading and parsing, and the process's peak memory."""

    seconds: float
    peak_mb: float


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    bandwidth, rate = memory_bandwidth(given.threads), product_rate(given.threads)
    runs: dict[tuple[str, int], Measured] = {}
    rows: list[Row] = []
    for method in given.methods:
        with tempfile.TemporaryDirectory() as folder:
            reply = write_replies(Path(folder), codec_of(method))
            for clients in given.clients:
                runs[method, clients] = in_own_process(method, Path(folder), clients, given.threads)
        for clients in given.clients:
            run, first = runs[method, clients], runs[method, given.clients[0]]
            floor = reply.bytes_moved(method) / bandwidth + reply.operations(method, clients) / rate
            row = {
                "clients": clients,
                "method": method.partition(":")[0],
                "codec": codec_of(method) if method != "fedavg" else None,
                "peak_mb": round(run.peak_mb),
                "times_first": rounded(run.peak_mb / first.peak_mb),
                "seconds": rounded(run.seconds / clients),
                "floor_seconds": rounded(floor),
                "times_floor": rounded(run.seconds / clients / floor),
            }
            rows.append(row)
    rows = with_times_fedavg(rows)
    foot = f"memory bandwidth {bandwidth / 1e9:.3g} GB/s, products in float64 {rate / 1e9:.3g} GFLOP/s"
    publish("server", rows, given.output, foot, threads=given.threads)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("server", __doc__)
    parser.add_argument(
        "--clients", default="10,100,1000", help="default: %(default)s; 1,000 of fedavg take 12 GB"
    )
    parser.add_argument("--methods", default="fedpm,fedpm:auto,fedavg", help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; default: %(default)s, as the application's"
    )
    given = parser.parse_args(arguments)
    given.methods = given.methods.split(",")
    for method in given.methods:
        if method.partition(":")[0] not in ("fedpm", "fedavg"):
            parser.error(f"--methods={method}; allowed, joined by commas: fedpm, fedpm:CODEC, fedavg")
        try:
            check_codec(codec_of(method))
        except ConfigError as error:
            parser.error(str(error))
    given.clients = whole_numbers(given.clients)
    if min(*given.clients, given.threads) < 1:
        parser.error("--clients and --threads are whole numbers; allowed: >= 1")
    return given


def codec_of(method: str) -> str:
    """In which its replies hold curvature."""
    return AUTO if method == "fedavg" else method.partition(":")[2] or FULL


def write_replies(folder: Path, codec: str) -> Work:
    """Serialised replies of clients that have moved a little from θ; what the last of them is."""
    model = make_model()
    optimizer = FOOF(model, lr=0.01, damping=1.0)
    for variant in range(_VARIANTS):
        optimizer.zero_grad()
        F.mse_loss(model(torch.randn(_BATCH, _SIDE)), torch.randn(_BATCH, _OUTPUTS)).backward()
        optimizer.step()
        with task_identity(1):
            config = ConfigRecord({messages.CURVATURE_CODEC: codec})
            content = RecordDict({messages.ARRAYS: ArrayRecord(model.state_dict()), messages.CONFIG: config})
            request = Message(content, dst_node_id=1, message_type="train")
            reply = messages.train_reply(request, model, {messages.NUM_EXAMPLES: variant + 1}, optimizer)
            size = messages.count_bytes(reply.content)
            payload = reply.content.config_records[messages.CURVATURE][messages.PAYLOAD]
        (folder / f"{variant}").write_bytes(message_to_proto(reply).SerializeToString())
    assert isinstance(payload, bytes)
    layers = decode(payload, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    kinds = [layer.curvature for layer in layers]
    return Work(size, tuple(k.basis.shape[1] if isinstance(k, LowRank) else _SIDE + 1 for k in kinds))


def in_own_process(method: str, folder: Path, clients: int, threads: int) -> Measured:
    """What one round takes, in a fresh process: peak memory never falls."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_one_round, args=(method, folder, clients, threads, theirs))
    process.start()
    theirs.close()
    try:
        return Measured(**ours.recv())
    except EOFError:
        raise SystemExit(f"{method} with {clients} clients did not end; is there enough memory?") from None
    finally:
        process.join()


def _one_round(method: str, folder: Path, clients: int, threads: int, connection: Connection) -> None:
    torch.set_num_threads(threads)
    strategy = (FedAvg if method == "fedavg" else FedPM)(fraction_evaluate=0.0)
    initial, grid = ArrayRecord(make_model().state_dict()), Replies(folder, clients)
    with task_identity(1):
        start = time.perf_counter()
        result = strategy.start(grid, initial, num_rounds=1)
        seconds = time.perf_counter() - start - grid.seconds
    assert result.arrays
    connection.send(asdict(Measured(seconds, peak_bytes() / _MB)))


def _linear_layers() -> list[nn.Linear]:
    return [layer for layer in make_model() if isinstance(layer, nn.Linear)]


if __name__ == "__main__":
    sys.exit(main())
