"""lightningexample: the model with its training, and the data."""

import lightning
import torch
import torch.nn.functional as F
from fedpm_flwr.optim import FOOF
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import DirichletPartitioner
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

fds = None  # made once in each process
transforms = Compose([ToTensor(), Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])


class LitNet(lightning.LightningModule):
    """Two convolutions and two linear layers, for images of 32 × 32 pixels in three colours."""

    def __init__(self, lr):
        super().__init__()
        self.lr = lr
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 5 * 5, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.head(self.features(x))

    def configure_optimizers(self):
        return FOOF(self, lr=self.lr, damping=0.1)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch["img"]), batch["label"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.measure(batch, "val")

    def test_step(self, batch, batch_idx):
        self.measure(batch, "eval")

    def measure(self, batch, name):
        outputs = self(batch["img"])
        self.log(f"{name}_loss", F.cross_entropy(outputs, batch["label"]))
        self.log(f"{name}_acc", (torch.argmax(outputs, dim=1) == batch["label"]).float().mean())


def apply_transforms(batch):
    batch["img"] = [transforms(image) for image in batch["img"]]
    return batch


def load_data(context):
    """Batches of the client's data, 80 % to train on and 20 % to evaluate on; labels differ by client."""
    global fds
    if fds is None:
        partitioner = DirichletPartitioner(
            num_partitions=context.node_config["num-partitions"], partition_by="label", alpha=0.5
        )
        fds = FederatedDataset(dataset=context.run_config["data-path"], partitioners={"train": partitioner})
    partition = fds.load_partition(context.node_config["partition-id"], "train")
    parts = partition.train_test_split(test_size=0.2, seed=42).with_transform(apply_transforms)
    batch_size = context.run_config["batch-size"]
    return DataLoader(parts["train"], batch_size, shuffle=True), DataLoader(parts["test"], batch_size)
