"""What one round tells, from the records of its replies, as one row of the report."""

from collections.abc import Callable, Mapping

from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from .grids import UplinkMeter
from .report import SPREAD, RunReport, spread

Average = Callable[[list[RecordDict], str], MetricRecord]


class Recorder:
    """Reads the metrics that a strategy aggregates, on their way, and the bytes that a meter counts."""

    def __init__(self, report: RunReport, meter: UplinkMeter, strategy: FedAvg) -> None:
        self._report, self._meter, self._bytes = report, meter, 0
        self._from_clients: dict[str, int | float] = {}
        training = self._noting(strategy.train_metrics_aggr_fn, ("train", "personal"))
        evaluation = self._noting(strategy.evaluate_metrics_aggr_fn, ("client", "personal"))

        def train(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
            averaged = training(replies, weighted_by)
            self._from_clients["clients"] = len(replies)
            return averaged

        strategy.train_metrics_aggr_fn, strategy.evaluate_metrics_aggr_fn = train, evaluation

    def end_round(self, server_round: int, tested: Mapping[str, float]) -> MetricRecord:
        """Give the report the row of this round; ``tested``: what the server has measured. Returns the row."""
        sent, self._bytes = self._meter.bytes - self._bytes, self._meter.bytes
        row = self._report.add_round(
            server_round, {"clients": 0} | self._from_clients | {**tested} | {"uplink-bytes": sent}
        )
        self._from_clients.clear()
        return MetricRecord({**row})

    def restore(self, rows: Mapping[int, MetricRecord]) -> None:
        """The rows of earlier rounds, as ``end_round`` has returned them."""
        self._report.rows = [_numbers(rows[number]) for number in sorted(rows)]

    def _noting(self, average: Average, names: tuple[str, ...]) -> Average:
        def noted(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
            averaged = average(replies, weighted_by)
            ours = tuple(f"-{which}" for which in SPREAD)
            self._from_clients |= {k: v for k, v in _numbers(averaged).items() if not k.endswith(ours)}
            for name in names:
                self._from_clients |= _spread(replies, f"{name}-accuracy", max) | _spread(
                    replies, f"{name}-loss", min
                )
            return averaged

        return noted


def _numbers(record: MetricRecord) -> dict[str, int | float]:
    """What is one number."""
    return {key: value for key, value in record.items() if not isinstance(value, list)}


def _spread(replies: list[RecordDict], name: str, best: Callable[[list[float]], float]) -> dict[str, float]:
    """The worst, median and best client's, where all clients tell it."""
    values = [_numbers(record).get(name) for reply in replies for record in reply.metric_records.values()]
    return spread(name, [value for value in values if value is not None], best)
