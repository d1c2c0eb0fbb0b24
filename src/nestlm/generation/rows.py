"""One policy for a batch in which each row runs at a budget of its own."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import Tensor

from nestlm.nn.policy import FULL, Decision, Policy, Stream, Width, mixed
from nestlm.router.base import RoutedPolicy
from nestlm.spec import SearchSpace, Site


def batch_policy(rows: Sequence[RoutedPolicy], *, space: SearchSpace, device: torch.device) -> Policy:
    """Combine the policies of rows into the policy of a batch. Rows of the same object are decided on together.

    Args:
        rows: what routers over the same space chose, one a row.
        space: sites and choices of the model.
        device: device of the model.
    """
    groups: dict[int, list[int]] = {}
    for number, routed in enumerate(rows):
        groups.setdefault(id(routed), []).append(number)
    specs = [routed.spec for routed in rows]
    if len(groups) == 1 or (len(set(specs)) == 1 and None not in specs):
        return rows[0].policy
    known = [space.indices(spec) for spec in specs if spec is not None]
    if len(known) == len(rows):
        return mixed(space, torch.tensor(known, device=device).T.contiguous())
    parts = [(torch.tensor(numbers, device=device), rows[numbers[0]].policy) for numbers in groups.values()]

    def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
        widths = space.choices.get(site)
        if widths is None:
            return FULL
        index_BL = torch.empty(hidden_BLD.shape[:2], dtype=torch.long, device=hidden_BLD.device)
        for owner, (numbers, part) in enumerate(parts):
            real_BL = None if stream.real_BL is None else stream.real_BL[numbers]
            width = part(site, hidden_BLD[numbers], Stream(real_BL, OwnedMemory(stream.memory, owner))).width
            index_BL[numbers] = choice_indices(width, widths)
        return Decision(Width.per_row(widths, index_BL))

    return policy


def choice_indices(width: Width, widths: tuple[int, ...]) -> Tensor:
    """Turn the width of a decision into indices of the site's choices, broadcastable to (B, L)."""
    if width.index is not None:
        return width.index if width.index.ndim == 2 else width.index[:, None]
    return torch.tensor(widths.index(width.count(widths[-1])))


class OwnedMemory(MutableMapping[Site, Tensor]):
    """The entries of one policy in a memory that several policies share, by site."""

    def __init__(self, memory: MutableMapping[Site, Tensor], owner: int) -> None:
        self.memory, self.prefix = memory, f"{owner}/"

    def key(self, site: Site) -> Site:
        """Return the key of a site in the shared memory."""
        return Site(self.prefix + site.axis, site.layer)

    def __getitem__(self, site: Site) -> Tensor:
        return self.memory[self.key(site)]

    def __setitem__(self, site: Site, kept: Tensor) -> None:
        self.memory[self.key(site)] = kept

    def __delitem__(self, site: Site) -> None:
        del self.memory[self.key(site)]

    def __iter__(self) -> Iterator[Site]:
        for site in self.memory:
            if site.axis.startswith(self.prefix):
                yield Site(site.axis.removeprefix(self.prefix), site.layer)

    def __len__(self) -> int:
        return sum(1 for _ in self)
