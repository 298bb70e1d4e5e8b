"""A mixture of experts as pure functions over what a State keeps, one expert after the other.

Kept are: `normed` [N, H], what router and experts read; the routing, `tokens` and `weights` [R] of each of R = N * k
routes in the order of experts, and `ends` [E], where each expert's routes end; `out.3` [routes, H], what expert 3 made
of its tokens; `mixed` [N, H], where such outputs are added up once they are as many as N. So a walk over all experts
costs k sums over [N, H], not one for each expert. Shape suffixes: N tokens, H hidden, E experts, R routes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F


def route(
    normed_NH: torch.Tensor, router_EH: torch.Tensor, *, per_token: int, normalized: bool
) -> dict[str, torch.Tensor]:
    """Send each token to its `per_token` likeliest experts; what a State keeps of that."""
    chances_NE = F.linear(normed_NH, router_EH).float().softmax(dim=-1)
    weights_NK, experts_NK = chances_NE.topk(per_token, dim=-1)
    if normalized:
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
    experts_R = experts_NK.reshape(-1)
    order_R = experts_R.argsort(stable=True)
    return {
        "normed": normed_NH,
        "tokens": order_R // per_token,
        "weights": weights_NK.reshape(-1)[order_R].to(normed_NH.dtype),
        "ends": experts_R.bincount(minlength=len(router_EH)).cumsum(dim=0),
    }


def inputs(kept: Mapping[str, torch.Tensor], expert: int) -> torch.Tensor:
    """The tokens routed to an expert, [tokens, H]."""
    return kept["normed"][kept["tokens"][_routes(kept, expert, expert)]]


def add(kept: Mapping[str, torch.Tensor], expert: int, out_RH: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keep an expert's output as well."""
    kept = {**kept, f"out.{expert}": out_RH}
    waiting = sum(len(tensor) for name, tensor in kept.items() if name.startswith("out."))
    return kept if waiting < len(kept["normed"]) else _mixed(kept)


def combined(kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weighted sum of all experts' outputs, [N, H]."""
    return _mixed(kept)["mixed"]


def _mixed(kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the outputs that wait to `mixed`."""
    waiting = {int(name.removeprefix("out.")): out for name, out in kept.items() if name.startswith("out.")}
    rest = {name: tensor for name, tensor in kept.items() if not name.startswith("out.")}
    mixed_NH = rest["mixed"] if "mixed" in rest else torch.zeros_like(rest["normed"])
    if waiting:
        routes = _routes(kept, min(waiting), max(waiting))
        out_RH = torch.cat([waiting[expert] for expert in sorted(waiting)])
        mixed_NH = mixed_NH.index_add(0, rest["tokens"][routes], out_RH * rest["weights"][routes, None])
    return {**rest, "mixed": mixed_NH}


def _routes(kept: Mapping[str, torch.Tensor], first: int, last: int) -> slice:
    """Where the routes to the experts `first` to `last` lie."""
    ends_E = kept["ends"]
    return slice(int(ends_E[first - 1]) if first else 0, int(ends_E[last]))
