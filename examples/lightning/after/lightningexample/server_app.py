"""lightningexample: the server."""

from fedpm_flwr.strategy import FedPM
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from lightningexample.task import LitNet

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    lr = context.run_config["learning-rate"]
    strategy = FedPM(fraction_train=1.0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(LitNet(lr).state_dict()),
        train_config=ConfigRecord({"lr": lr}),
        num_rounds=context.run_config["num-server-rounds"],
    )
