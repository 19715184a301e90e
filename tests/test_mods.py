"""Flower's mods of ClientApps around FedPM's client: those that count may stay, those for privacy are refused."""

import logging
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)
from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor

from fedpm_flwr.guarded import FailedRoundsError, Guarded
from fedpm_flwr.packing import PackedGrid, packed_arrays
from fedpm_flwr.privacy import refuse_differential_privacy
from fedpm_flwr.strategy import FedPM

from .apps import federate
from .test_strategy import good_client, make_model

CLIPPING = 0.1
"""What Flower's wrappers send to their mods as ``clipping_norm``, as a user might by hand."""


def modded(*mods: Mod) -> ClientApp:
    app, good = ClientApp(mods=list(mods)), good_client()

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        return good(msg, context)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        raise RuntimeError("nobody asks")

    return app


def weights(client: ClientApp, strategy: Strategy, is_packed: bool = False) -> Tensor:
    wrap = PackedGrid if is_packed else lambda grid: grid
    return federate(client, strategy, make_model(), 3, 2, wrap).arrays.to_torch_state_dict()["weight"]


@pytest.mark.parametrize("strategy", [FedAvg, FedPM])
@pytest.mark.parametrize(
    "mods",
    [[arrays_size_mod, message_size_mod], [arrays_size_mod, packed_arrays, message_size_mod]],
    ids=["as they are", "around packed arrays"],
)
def test_mods_that_count_change_nothing(
    mods: list[Mod], strategy: type[FedAvg], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="flwr"):
        found = weights(modded(*mods), strategy(fraction_evaluate=0.0), packed_arrays in mods)
    torch.testing.assert_close(found, weights(modded(), strategy(fraction_evaluate=0.0)))
    assert caplog.text.count("Outgoing message size") == 6
    assert caplog.text.count("Total array elements sent") == 6


def test_the_curvature_is_in_the_size_of_the_message(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flwr"):
        for strategy in (FedAvg, FedPM):
            weights(modded(message_size_mod), strategy(fraction_evaluate=0.0))
    sizes = [int(line.getMessage().split()[3]) for line in caplog.records if "Outgoing" in line.getMessage()]
    assert min(sizes[6:]) > max(sizes[:6])


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 0.1)])
def test_mods_for_privacy_let_no_curvature_pass(mod: Mod, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FailedRoundsError):
        federate(
            modded(mod),
            FedPM(fraction_evaluate=0.0, max_failed_rounds=1),
            make_model(),
            3,
            train_config=ConfigRecord({"clipping_norm": CLIPPING}),
        )
    name = getattr(mod, "__name__", type(mod).__name__)
    assert caplog.text.count(f"{name} protects parameters, not curvature: take a strategy without") == 3


@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 0.1)])
@pytest.mark.parametrize("workers", ["threads", "forks"])
def test_nor_from_a_worker_of_the_client(mod: Mod, workers: str, caplog: pytest.LogCaptureFixture) -> None:
    """A thread does not have the mod among its callers; a fork has its parent's."""
    app, good = ClientApp(mods=[mod]), good_client()

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        if workers == "threads":
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(good, msg, context).result()
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as forks:
            forks.submit(refuse_differential_privacy).result()
        raise AssertionError("not refused")

    with pytest.raises(FailedRoundsError):
        federate(
            app,
            FedPM(fraction_evaluate=0.0, max_failed_rounds=1),
            make_model(),
            3,
            train_config=ConfigRecord({"clipping_norm": CLIPPING}),
        )
    name = getattr(mod, "__name__", type(mod).__name__)
    assert caplog.text.count(f"{name} protects parameters, not curvature: take a strategy without") == 3


def test_a_process_of_its_own_says_that_it_cannot_see_mods() -> None:
    """And nothing is said where nobody has made a process of it, as in a test or notebook."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, warnings.simplefilter, ("error", UserWarning)) as pool:
        alone = pool.submit(refuse_differential_privacy)
        with pytest.raises(UserWarning, match="cannot be seen whether the ClientApp has mods for differential"):
            alone.result()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_differential_privacy()
        with ThreadPoolExecutor(1) as threads:
            threads.submit(refuse_differential_privacy).result()


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod])
def test_without_its_wrapper_a_clipping_mod_says_so_itself(mod: Mod, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FailedRoundsError):
        federate(modded(mod), FedPM(fraction_evaluate=0.0, max_failed_rounds=1), make_model(), 3)
    assert f"{mod.__name__} requires the key 'clipping_norm'" in caplog.text


@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 0.1)])
def test_without_curvature_the_same_client_may_have_them(mod: Mod) -> None:
    found = federate(
        modded(mod),
        Guarded(fraction_evaluate=0.0),
        make_model(),
        3,
        train_config=ConfigRecord({"clipping_norm": CLIPPING}),
    )
    assert set(found.arrays) == {"weight", "bias"}
