"""loraexample: the model, the data, training and evaluation."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 64


def get_model():
    """A small language model over bytes, with adapters; a pretrained one comes by ``from_pretrained``."""
    torch.manual_seed(0)  # what is frozen does not travel, and has to be the same everywhere
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **sizes))
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora)


def load_data(context):
    """Batches of the client's part of the text: four of five sequences to train on, the fifth to evaluate on."""
    text = torch.tensor(list(Path(context.run_config["data-path"]).read_bytes()))
    part = text.tensor_split(context.node_config["num-partitions"])[context.node_config["partition-id"]]
    sequences = part[: len(part) // LENGTH * LENGTH].reshape(-1, LENGTH)
    is_test = torch.arange(len(sequences)) % 5 == 4
    batch_size = context.run_config["batch-size"]
    return DataLoader(sequences[~is_test], batch_size, shuffle=True), DataLoader(sequences[is_test], batch_size)


def train(model, optimizer, trainloader, epochs, device):
    """Train, and return the mean loss."""
    model.train()
    total = 0.0
    for _ in range(epochs):
        for batch in trainloader:
            ids = batch.to(device)
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(trainloader))


def test(model, loader, device):
    """Mean loss."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in loader:
            ids = batch.to(device)
            total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    return total / len(loader.dataset)
