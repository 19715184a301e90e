"""The application's client: wiring only."""

import torch
import torch.nn.functional as F
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor
from torch.utils.data import Subset

from fedpm_flwr import messages
from fedpm_flwr.algorithms import get_algorithm
from fedpm_flwr.config import Config
from fedpm_flwr.method import Job
from fedpm_flwr.packing import packed_arrays
from fedpm_flwr.tasks import Examples, Form, build_model, client_data, site_data
from fedpm_flwr.training import derive_seed, evaluate, loader, pick_device, reproducible

DATA_PATH = "data-path"
"""In a node's configuration: its site's own data; absent: its partition of ``dataset``."""

Example = tuple[Tensor, Tensor]
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
    """Say which partition this node holds; an error if its site's data cannot be read."""
    if DATA_PATH in context.node_config:
        site_data(str(context.node_config[DATA_PATH]))
    return messages.partition_reply(message, context)


def _job(config: Config, message: Message, context: Context, device: torch.device, seed: int) -> Job:
    """The request with what it takes to answer it."""
    form = Form.from_text(messages.asked(message, messages.FORM) or "")
    data, augmented = (_data(config, context, form, augment=augment) for augment in (False, config.augment))
    batches = loader(augmented, config.batch_size, seed)
    model = build_model(config.model, form.input_shape, form.classes, config.seed, form.input_dtype)
    model.to(getattr(torch, config.dtype))
    model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
    client = f"partition-{messages.partition_of(context)[0]}"
    return Job(
        config=config,
        request=message,
        model=model.to(device),
        batches=batches,
        whole=loader(data, config.batch_size),
        examples=len(data),
        steps_an_epoch=len(batches),
        loss=F.cross_entropy,
        device=device,
        seed=seed,
        state=messages.client_state(message, messages.state_folder(context), client),
    )


def _data(config: Config, context: Context, form: Form, *, augment: bool) -> Examples | Subset[Example]:
    if DATA_PATH not in context.node_config:
        return client_data(config, *messages.partition_of(context), augment=augment)
    examples = site_data(str(context.node_config[DATA_PATH]), form).first(config.max_train_examples)
    return examples.augmented() if augment else examples
