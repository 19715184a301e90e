"""pytorchexample: the model, the data, training and evaluation."""

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


class Net(nn.Module):
    """Two convolutions and three linear layers, for images of 32 × 32 pixels in three colours."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


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


def train(net, trainloader, epochs, lr, device):
    """Train, and return the mean loss."""
    optimizer = FOOF(net, lr=lr, damping=0.1)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for batch in trainloader:
            images, labels = batch["img"].to(device), batch["label"].to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(trainloader)), optimizer


def test(net, loader, device):
    """Mean loss and accuracy."""
    net.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for batch in loader:
            images, labels = batch["img"].to(device), batch["label"].to(device)
            outputs = net(images)
            loss += F.cross_entropy(outputs, labels, reduction="sum").item()
            correct += (outputs.argmax(dim=1) == labels).sum().item()
    return loss / len(loader.dataset), correct / len(loader.dataset)
