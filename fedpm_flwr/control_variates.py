"""Control variates: local steps by gᵢ − cᵢ + c, so that many local steps have the optimum as fixed point.

cᵢ is client i's gradient ∇fᵢ at the model that it last started a round from, and c = Σ wᵢcᵢ, with the
weights of the mixing, over all clients ever seen. Both are of that last time: a client's pair (cᵢ, c)
always belongs together, and costs no exchange of its own. docs/algorithm.md derives why.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from flwr.app import ConfigRecord, Message
from torch import Tensor

from . import messages
from .replies import ReplyError, read_tensors
from .rewriting import with_extra
from .state import ClientState

_log = logging.getLogger("flwr")
CORRECTIONS = ("none", "control-variate", "fresh")
VARIATE_ROUND = "variate-round"
"""In the request's config: the round whose cᵢ is in the c that goes with it; absent: none is."""


def pair(request: Message, state: ClientState, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """c − cᵢ by parameter name, where ``gradient`` is; empty if this client has to step uncorrected.

    That is so where the server has no cᵢ of this client, or one that the client itself no longer has.
    ``gradient`` is ∇fᵢ(θ), which is cᵢ where the request's c is of this very round.
    """
    counted = counted_round(request)
    if counted is None:
        return {}
    own = gradient if counted == messages.server_round_of(request) else state.load(counted)
    if not own:
        return {}
    common = read_tensors(request.content)
    here = {name: value for name, value in gradient.items() if name in own and name in common}
    return {name: common[name].to(value) - own[name].to(value) for name, value in here.items()}


def counted_round(request: Message) -> int | None:
    """The round whose cᵢ the server counts on, if any."""
    asked = messages.asked(request, VARIATE_ROUND)
    return None if asked is None else int(asked)


def read_variate(reply: Message, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The cᵢ in a reply, checked against the shapes of the model's parameters, of which it may lack some.

    Raises:
        ReplyError: naming what is wrong.
    """
    variate = read_tensors(reply.content)
    unknown = sorted(set(variate) - set(shapes))
    if unknown or not variate:
        raise ReplyError(f"its control variate is not of the model's parameters: {', '.join(unknown[:5])}")
    return read_tensors(reply.content, {key: shapes[key] for key in variate})


class Variates:
    """The server's side: every client's newest cᵢ, on disk.

    What a round brings is taken by ``add`` and counts from ``commit`` on: if the round fails, the clients'
    cᵢ of the round before still stand, here and there.

    Args:
        run: its name.
        state_of: where in that run a client's cᵢ are kept.
    """

    def __init__(self, run: str, state_of: Callable[[int], ClientState]) -> None:
        self.run, self._state = run, state_of
        self.newest: dict[int, tuple[int, float]] = {}
        """By client: the round of its cᵢ, and wᵢ."""
        self._added: dict[int, tuple[int, float]] = {}

    def mean(self) -> dict[str, Tensor]:
        """c = Σ wᵢcᵢ / Σ wᵢ, by parameter name; empty: no client has been seen.

        Summed anew from disk: a sum that is kept by adding and subtracting would keep the rounding errors
        of a huge cᵢ for ever, long after the client has sent another. A client whose file cannot be read
        is as if it had not been seen.
        """
        return weighted_mean(self._readable())

    def _readable(self) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """wᵢ and cᵢ, one after another: all of them together may be more than fits in memory."""
        for client, (number, weight) in list(self.newest.items()):
            variate = self._state(client).load(number)
            if variate:
                yield weight, variate
            else:
                del self.newest[client]

    def requests(
        self,
        requests: Iterable[Message],
        dtypes: Mapping[str, torch.dtype],
        client_of: Callable[[int], int],
    ) -> list[Message]:
        """The requests with c in the model's dtypes, and the round of the cᵢ that it counts for each client.

        ``client_of``: which client a node is.
        """
        self._added = {}
        common = as_record(self.mean(), dtypes)
        return [
            with_extra(request, common, {VARIATE_ROUND: self.newest[client][0]})
            if client in self.newest
            else request
            for request in requests
            for client in [client_of(request.metadata.dst_node_id)]
        ]

    def add(self, client: int, server_round: int, variate: Mapping[str, Tensor], weight: float) -> None:
        """Write a client's new cᵢ to disk; if that fails, its last one stands, and the log says so."""
        try:
            counted, _ = self.newest.get(client, (None, 0.0))
            self._state(client).save(server_round, variate, counted)
        except OSError as error:
            _log.warning("a control variate could not be written, the client's last one stands: %s", error)
            return
        self._added[client] = server_round, weight

    def commit(self) -> None:
        """Let the cᵢ that were added replace those before them."""
        self.newest |= self._added
        self._added = {}


def as_record(common: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> ConfigRecord:
    """c for a request: as precise as the model, but not less than float32."""
    return messages.tensors_record(
        {key: value.to(torch.promote_types(dtypes[key], torch.float32)) for key, value in common.items()}
    )


def weighted_mean(gradients: Iterable[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """c = Σ wᵢcᵢ / Σ wᵢ in float64; a parameter that a client lacks counts as zeros there."""
    total, summed = 0.0, dict[str, Tensor]()
    for weight, gradient in gradients:
        total += weight
        for key, value in gradient.items():
            term = weight * value.double()
            summed[key] = summed[key] + term if key in summed else term
    return {key: value / total for key, value in summed.items()}
