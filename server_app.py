"""The application's server: wiring only."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedpm_flwr.algorithms import get_algorithm, settings_without_effect
from fedpm_flwr.config import Config
from fedpm_flwr.grids import UplinkMeter
from fedpm_flwr.packing import PackedGrid
from fedpm_flwr.report import SPREAD, RunReport, spread
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.tasks import build_model, distance, load_dataset, load_reference, load_weights
from fedpm_flwr.training import evaluate, loader, pick_device, reproducible

_EVALUATION_BATCH = 512

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train by the configured algorithm, test each round's global model, leave a report."""
    config = Config.from_run_config(context.run_config)
    device = pick_device(config.device)
    split = load_dataset(config.dataset, config.max_train_examples)
    model = build_model(config.model, split.input_shape, split.classes, config.seed, split.input_dtype)
    model.to(device, getattr(torch, config.dtype))
    if config.initial_model:
        load_weights(model, config.initial_model)
    reference = load_reference(model, config.reference_model) if config.reference_model else None
    test_batches = loader(split.test, _EVALUATION_BATCH)
    report = RunReport(config)
    for line in settings_without_effect(config):
        report.say(line)
    meter = UplinkMeter(grid)
    packed = PackedGrid(meter, config.update) if config.packed_arrays else meter
    ordered = PartitionOrderedGrid(packed, config.seed)
    from_clients: dict[str, int | float] = {}

    def evaluate_global_model(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = evaluate(model, test_batches, F.cross_entropy, device)
        tested = {"test-accuracy": accuracy, "test-loss": loss}
        sent = meter.bytes - sum(int(row["uplink-bytes"]) for row in report.rows)
        if reference is not None:
            tested["distance"] = distance(model, reference)
        report.add_round(server_round, {"clients": 0} | from_clients | tested | {"uplink-bytes": sent})
        from_clients.clear()
        return MetricRecord({**tested})

    strategy = get_algorithm(config.algorithm).strategy(config)
    average = strategy.train_metrics_aggr_fn

    def note_training(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
        averaged = average(replies, weighted_by)
        from_clients.update(_numbers(averaged))
        for name in ("train", "personal"):
            from_clients.update(_spread(replies, f"{name}-accuracy", max) | _spread(replies, f"{name}-loss", min))
        from_clients["clients"] = len(replies)
        return averaged

    def note_evaluation(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
        averaged = average(replies, weighted_by)
        from_clients.update(_numbers(averaged))
        for name in ("client", "personal"):
            from_clients.update(_spread(replies, f"{name}-accuracy", max) | _spread(replies, f"{name}-loss", min))
        return averaged

    strategy.train_metrics_aggr_fn, strategy.evaluate_metrics_aggr_fn = note_training, note_evaluation
    try:
        with reproducible(config.seed, config.threads, device):
            result = strategy.start(
                grid=ordered,
                initial_arrays=ArrayRecord(model.state_dict()),
                num_rounds=config.num_server_rounds,
                evaluate_fn=evaluate_global_model,
            )
        if not result.arrays:
            raise RuntimeError("no round gave a new model; the log says what was wrong with the replies")
    except BaseException:
        report.save(model.state_dict())
        raise
    report.finish(model.state_dict())


def _numbers(record: MetricRecord) -> dict[str, int | float]:
    """What is one number, and not under a name of ours."""
    ours = tuple(f"-{which}" for which in SPREAD)
    return {k: v for k, v in record.items() if not (isinstance(v, list) or k.endswith(ours))}


def _spread(replies: list[RecordDict], name: str, best: Callable[[list[float]], float]) -> dict[str, float]:
    """The worst, median and best client's, where all clients tell it."""
    values = [_numbers(record).get(name) for reply in replies for record in reply.metric_records.values()]
    return spread(name, [value for value in values if value is not None], best)
