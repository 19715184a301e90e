"""Lightning's Trainer, which steps by a closure and wraps the optimizer: as a plain loop."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedpm_flwr.optim import FOOF

lightning = pytest.importorskip("lightning", reason="lightning not installed; make test-examples installs it")
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


_Base: Any = lightning.LightningModule


class Module(_Base):  # type: ignore[misc] # unknown where it is not installed
    """One that keeps what Lightning calls its optimizer in the meantime."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def configure_optimizers(self) -> FOOF:
        return FOOF(self, lr=0.3, damping=0.1, refresh_interval=1, inverse_interval=2)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.net(100 * batch[0])

    def on_train_end(self) -> None:
        self.wrapped: Any = self.optimizers()


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(4, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [(part, (part[:, 0] > 0).long()) for part in x]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_steps_and_measures_as_a_plain_loop(accumulated: int) -> None:
    """With validation before and in between, which is not measured."""
    model, plain = Module(), Module()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, accumulate_grad_batches=accumulated, **QUIET
    )
    loader: Any = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type] # any sequence
    trainer.fit(model, loader, loader)
    optimizer = plain.configure_optimizers()
    for index, batch in enumerate(batches() * 2, start=1):
        (plain.training_step(batch) / accumulated).backward()
        if index % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-12, atol=0)
    assert type(trainer.optimizers[0]) is FOOF
    expected = optimizer.preconditioners()
    assert len(expected) == 2
    for found in (trainer.optimizers[0].preconditioners(), model.wrapped.preconditioners()):
        assert [layer.block for layer in found] == [layer.block for layer in expected]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.curvature.parts(), other.curvature.parts(), rtol=1e-12, atol=0)
