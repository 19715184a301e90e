"""The campaign of broken and lying payloads, shorter; and that it would notice."""

import json
import random

import pytest
import torch

from benchmarks import hostile
from fedpm_flwr.curvature import Block, Diagonal, LayerCurvature
from fedpm_flwr.wire import PayloadError, decode

from .helpers import CODECS


def test_every_codec_is_attacked() -> None:
    assert set(CODECS) <= set(hostile.CODECS)


def test_no_payload_does_harm(capsys: pytest.CaptureFixture[str]) -> None:
    assert hostile.main(["--cases", "4000", "--seed", "1"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert any("the process's largest memory grew by" in told for told in table)
    rows = json.loads(line.removeprefix("RESULT "))["rows"]
    assert {row["codec"] for row in rows} == set(hostile.CODECS)


def test_every_change_makes_payloads_that_are_refused_and_most_some_that_are_not() -> None:
    """Else the campaign would be of one sort only."""
    payload = hostile.make_payload("triangle-int8")
    for change in set(hostile._CHANGES):
        refused = 0
        for case in range(300):
            try:
                decode(change(payload, random.Random(case)), hostile._SHAPES, hostile.MAX_BYTES)
            except PayloadError:
                refused += 1
        assert refused > 0, change


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), MemoryError()])
def test_another_error_ends_it(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object) -> None:
        raise error

    payload = hostile.make_payload("diagonal")
    monkeypatch.setattr(hostile, "decode", fails)
    with pytest.raises(type(error)):
        hostile.attack("diagonal", payload, 5, 3)
    assert "codec diagonal, seed 3, case 0" in capsys.readouterr().err


def test_what_cannot_be_computed_with_ends_it() -> None:
    block = Block("low", ("low.weight",))
    for wrong in (torch.full((2, 8), torch.nan), torch.full((2, 8), -1.0)):
        with pytest.raises(AssertionError):
            hostile.check([LayerCurvature(block, Diagonal(wrong), 0.0)])


def test_too_few_cases_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hostile.main(["--cases", "3"])
    assert "--cases=3 is not allowed; allowed: >= 10" in capsys.readouterr().err
