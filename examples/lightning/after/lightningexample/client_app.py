"""lightningexample: the client."""

from fedpm_flwr.messages import curvature_record
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from lightning import Trainer
from lightningexample.task import LitNet, load_data

app = ClientApp()
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@app.train()
def train(msg: Message, context: Context):
    """Train the model on the client's data."""
    model = LitNet(msg.content["config"]["lr"])
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    trainloader, valloader = load_data(context)
    trainer = Trainer(max_epochs=context.run_config["local-epochs"], devices=1, **QUIET)
    trainer.fit(model, trainloader, valloader)
    metrics = {
        "train_loss": trainer.callback_metrics["train_loss"].item(),
        "num-examples": len(trainloader.dataset),
    }
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord(metrics),
            "curvature": curvature_record(trainer.optimizers[0], msg),
        }
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on the part of the client's data that it is not trained on."""
    model = LitNet(lr=0.0)
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, valloader = load_data(context)
    (measured,) = Trainer(devices=1, **QUIET).test(model, valloader, verbose=False)
    metrics = {**measured, "num-examples": len(valloader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
