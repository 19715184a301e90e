"""loraexample: the client."""

import torch
from fedpm_flwr.messages import curvature_record
from fedpm_flwr.optim import FOOF
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from loraexample.task import get_model, load_data
from loraexample.task import test as test_fn
from loraexample.task import train as train_fn
from peft import get_peft_model_state_dict, set_peft_model_state_dict

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the adapters on the client's data."""
    model, device = load_model(msg)
    trainloader, _ = load_data(context)
    optimizer = FOOF(model, lr=0.3, damping=0.1, clip=1.0)
    train_loss = train_fn(model, optimizer, trainloader, context.run_config["local-epochs"], device)
    metrics = {"train_loss": train_loss, "num-examples": len(trainloader.dataset)}
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord(metrics),
            "curvature": curvature_record(optimizer, msg),
        }
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on the part of the client's data that it is not trained on."""
    model, device = load_model(msg)
    _, valloader = load_data(context)
    metrics = {"eval_loss": test_fn(model, valloader, device), "num-examples": len(valloader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


def load_model(msg: Message):
    """The model with the adapters of the message, and its device."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    model = get_model()
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    return model.to(device), device
