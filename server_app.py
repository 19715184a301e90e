"""The application's server: wiring only."""

from pathlib import Path

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedpm_flwr import messages
from fedpm_flwr.algorithms import get_algorithm, settings_without_effect
from fedpm_flwr.checkpointed import Checkpointed
from fedpm_flwr.config import Config
from fedpm_flwr.events import events_to
from fedpm_flwr.grids import UplinkMeter
from fedpm_flwr.packing import PackedGrid
from fedpm_flwr.recorder import Recorder
from fedpm_flwr.report import RunReport, output_folder
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
    split = load_dataset(config.dataset, config.max_train_examples, config.validation_share)
    model = build_model(config.model, split.input_shape, split.classes, config.seed, split.input_dtype)
    model.to(device, getattr(torch, config.dtype))
    if config.initial_model:
        load_weights(model, config.initial_model)
    reference = load_reference(model, config.reference_model) if config.reference_model else None
    test_batches = loader(split.test, _EVALUATION_BATCH)
    strategy = get_algorithm(config.algorithm).strategy(config)
    folder = output_folder(config)
    checkpointed = _checkpointed(strategy, folder, config)
    resumed = checkpointed.resumed if checkpointed else None
    if resumed:
        model.load_state_dict(resumed.arrays.to_torch_state_dict())
    report = RunReport(config, folder)  # only now: what is refused changes nothing in an earlier run's folder
    for line in settings_without_effect(config):
        report.say(line)
    meter = UplinkMeter(grid)
    packed = PackedGrid(meter, config.update) if config.packed_arrays else meter
    ordered = PartitionOrderedGrid(packed, config.seed, config.round_timeout)
    recorder = Recorder(report, meter, strategy)
    if resumed:
        report.say(f"taken up after round {resumed.server_round} of {config.resume}")
        for line in config.changed_since(resumed.settings):
            report.say(line)
        recorder.restore(resumed.history.evaluate_metrics_serverapp)

    def evaluate_global_model(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = evaluate(model, test_batches, F.cross_entropy, device)
        tested = {"test-accuracy": accuracy, "test-loss": loss}
        if reference is not None:
            tested["distance"] = distance(model, reference)
        report.keep(model.state_dict(), server_round)
        return recorder.end_round(server_round, tested)

    try:
        with reproducible(config.seed, config.threads, device), events_to(folder / "events.jsonl"):
            (checkpointed or strategy).start(
                grid=ordered,
                initial_arrays=ArrayRecord(model.state_dict()),
                num_rounds=config.num_server_rounds,
                timeout=config.round_timeout,
                train_config=ConfigRecord({messages.FORM: split.form.to_text()}),
                evaluate_config=ConfigRecord({messages.FORM: split.form.to_text()}),
                evaluate_fn=evaluate_global_model,
            )
    except BaseException:  # also SystemExit, as by `flwr stop`
        report.close()
        raise
    report.finish(model.state_dict())


def _checkpointed(strategy: Strategy, folder: Path, config: Config) -> Checkpointed | None:
    if not (config.checkpoint_every or config.resume):
        return None
    return Checkpointed(
        strategy,
        folder / "checkpoints",
        every=config.checkpoint_every or config.num_server_rounds,
        keep=config.checkpoint_keep,
        resume=f"{config.resume}/checkpoints" if config.resume else None,
        settings=config.to_run_config(),
    )
