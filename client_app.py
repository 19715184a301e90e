"""The application's client: wiring only."""

import torch
import torch.nn.functional as F
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import Subset

from fedpm_flwr import messages
from fedpm_flwr.algorithms import get_algorithm
from fedpm_flwr.config import Config
from fedpm_flwr.tasks import build_model, clients_data, load_dataset
from fedpm_flwr.training import derive_seed, evaluate, fit, loader, pick_device, reproducible

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Start from the global model, take the local steps, reply with model, metrics and curvature."""
    config = Config.from_run_config(context.run_config)
    device = pick_device(config.device)
    seed = derive_seed(config.seed, messages.server_round_of(message), messages.partition_of(context)[0])
    with reproducible(seed, config.threads, device):
        data = _local_data(config, context)
        batches = loader(data, config.batch_size, seed)
        model = _global_model(config, message).to(device)
        steps = config.local_steps or config.local_epochs * len(batches)
        codec = messages.asked_codec(message) if steps == 1 else None
        optimizer = get_algorithm(config.algorithm).optimizer(config, model, codec)
        result = fit(model, batches, optimizer, F.cross_entropy, steps=steps, device=device)
        metrics = {messages.NUM_EXAMPLES: len(data), "train-loss": result.loss, "local-steps": result.steps}
        return messages.train_reply(message, model, metrics, optimizer)


@app.evaluate()
def evaluate_global_model(message: Message, context: Context) -> Message:
    """Loss and accuracy of the global model on the client's own examples."""
    config = Config.from_run_config(context.run_config)
    device = pick_device(config.device)
    with reproducible(config.seed, config.threads, device):
        data = _local_data(config, context)
        model = _global_model(config, message).to(device)
        loss, accuracy = evaluate(model, loader(data, config.batch_size), F.cross_entropy, device)
    metrics = {messages.NUM_EXAMPLES: len(data), "loss": loss, "accuracy": accuracy}
    return messages.metrics_reply(message, metrics)


@app.query(messages.PARTITION_ACTION)
def partition(message: Message, context: Context) -> Message:
    """Say which partition this node holds."""
    return messages.partition_reply(message, context)


def _local_data(config: Config, context: Context) -> Subset[tuple[torch.Tensor, ...]]:
    partition_id, num_partitions = messages.partition_of(context)
    return clients_data(config.dataset, num_partitions, config.partition, config.alpha, config.seed)[partition_id]


def _global_model(config: Config, message: Message) -> nn.Module:
    split = load_dataset(config.dataset)
    model = build_model(config.model, split.input_shape, split.classes, config.seed)
    model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
    return model
