"""One batch in which each row runs at a budget of its own: answers of routers, put together into one policy."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import Tensor

from nestlm.nn.policy import WHOLE, Decision, Mixed, Policy, Stream, mixed
from nestlm.router.base import Answer
from nestlm.spec import SearchSpace, Site


def policy_of_rows(answers: Sequence[Answer], *, space: SearchSpace, device: torch.device) -> Policy:
    """The policy of a batch, one answer a row. Rows of the same answer are decided on together.

    Args:
        answers: of one model, of routers over the same space.
        space: its choices.
        device: where the model computes.
    """
    groups: dict[int, list[int]] = {}
    for row, answer in enumerate(answers):
        groups.setdefault(id(answer), []).append(row)
    specs = [answer.spec for answer in answers]
    if len(groups) == 1 or (len(set(specs)) == 1 and None not in specs):
        return answers[0].policy
    known = [space.indices(spec) for spec in specs if spec is not None]
    if len(known) == len(answers):
        return mixed(space, torch.tensor(known, device=device).T.contiguous())
    parts = [(torch.tensor(rows, device=device), answers[rows[0]].policy) for rows in groups.values()]

    def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
        widths = space.choices.get(site)
        if widths is None:
            return WHOLE
        index_BL = torch.empty(hidden_BLD.shape[:2], dtype=torch.long, device=hidden_BLD.device)
        for number, (rows, part) in enumerate(parts):
            real_BL = None if stream.real_BL is None else stream.real_BL[rows]
            width = part(site, hidden_BLD[rows], Stream(real_BL, Notes(stream.memory, number))).width
            index_BL[rows] = choice_of(width, widths)
        return Decision(Mixed(widths, index_BL))

    return policy


def choice_of(width: int | Mixed | None, widths: tuple[int, ...]) -> Tensor:
    """A width as indices of a site's choices, broadcastable to (B, L)."""
    if isinstance(width, Mixed):
        return width.index if width.index.ndim == 2 else width.index[:, None]
    return torch.tensor(len(widths) - 1 if width is None else widths.index(width))


class Notes(MutableMapping[Site, Tensor]):
    """What one of several policies remembers, in a memory that they share."""

    def __init__(self, memory: MutableMapping[Site, Tensor], owner: int) -> None:
        self.memory, self.prefix = memory, f"{owner}/"

    def key(self, site: Site) -> Site:
        """The site's name in the shared memory."""
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
