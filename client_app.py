"""The application's client: wiring only."""

from pathlib import Path

import torch
import torch.nn.functional as F
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedpm_flwr import messages
from fedpm_flwr.algorithms import get_algorithm
from fedpm_flwr.config import Config
from fedpm_flwr.method import Job
from fedpm_flwr.packing import packed_arrays
from fedpm_flwr.state import ClientState
from fedpm_flwr.tasks import build_model, client_data, load_dataset
from fedpm_flwr.training import derive_seed, evaluate, loader, pick_device, reproducible

app = ClientApp(mods=[packed_arrays])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Start from the global model, take the local steps, reply with model, metrics and curvature."""
    config = Config.from_run_config(context.run_config)
    device = pick_device(config.device)
    seed = derive_seed(config.seed, messages.server_round_of(message), messages.partition_of(context)[0])
    with reproducible(seed, config.threads, device):
        return get_algorithm(config.algorithm).client(_job(config, message, context, device, seed))


@app.evaluate()
def evaluate_global_model(message: Message, context: Context) -> Message:
    """Loss and accuracy of the global model on the client's own examples, and what else the method measures."""
    config = Config.from_run_config(context.run_config)
    device = pick_device(config.device)
    further = get_algorithm(config.algorithm).evaluate
    with reproducible(config.seed, config.threads, device):
        job = _job(config, message, context, device, config.seed)
        loss, accuracy = evaluate(job.model, job.whole, job.loss, device)
        metrics = {**job.metrics, "client-loss": loss, "client-accuracy": accuracy}
        return messages.metrics_reply(message, metrics | (further(job) if further else {}))


@app.query(messages.PARTITION_ACTION)
def partition(message: Message, context: Context) -> Message:
    """Say which partition this node holds."""
    return messages.partition_reply(message, context)


def _job(config: Config, message: Message, context: Context, device: torch.device, seed: int) -> Job:
    """The request with what it takes to answer it."""
    partition, partitions = messages.partition_of(context)
    data = client_data(config, partition, partitions)
    batches = loader(client_data(config, partition, partitions, augment=config.augment), config.batch_size, seed)
    return Job(
        config=config,
        request=message,
        model=_global_model(config, message).to(device),
        batches=batches,
        whole=loader(data, config.batch_size),
        examples=len(data),
        steps_an_epoch=len(batches),
        loss=F.cross_entropy,
        device=device,
        seed=seed,
        state=_state(config, message, partition),
    )


def _global_model(config: Config, message: Message) -> nn.Module:
    split = load_dataset(config.dataset, config.max_train_examples)
    model = build_model(config.model, split.input_shape, split.classes, config.seed, split.input_dtype)
    model.to(getattr(torch, config.dtype))
    model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
    return model


def _state(config: Config, message: Message, partition: int) -> ClientState:
    folder = Path(config.state_folder) if config.state_folder else None
    return ClientState(folder, messages.asked(message, messages.EXPERIMENT) or "unnamed", f"partition-{partition}")
