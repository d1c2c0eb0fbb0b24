"""Many specs in one batch: each sequence equals its own run, each token its masked self, forward and backward."""

from copy import deepcopy
from itertools import pairwise
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nestlm.elastic.sampler.base import independent
from nestlm.nn.decoder import Decoder
from nestlm.nn.kv_cache import KVCache
from nestlm.nn.policy import Decision, Policy, Width, constant, fixed, full, mixed
from nestlm.spec import SearchSpace

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
BATCH, LENGTH = 5, 12


@pytest.fixture
def tokens_BL() -> torch.Tensor:  # noqa: N802 (its shape)
    return torch.randint(0, 50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


# Two documents in a row here and there: attention is then masked.
DOCUMENTS_BL = (torch.arange(LENGTH) >= torch.tensor([4, 99, 7, 1, 99])[:, None]).long()


def draw_indices(space: SearchSpace, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, len(widths), shape, generator=generator) for widths in space.choices.values()]
    return torch.stack(rows)


def masked_tokens(space: SearchSpace, indices_SBL: torch.Tensor) -> Policy:
    """The oracle: everything runs, and what a token leaves out is multiplied by 0."""

    def mask(widths: tuple[int, ...], index_BL: torch.Tensor) -> Decision:
        chosen = torch.tensor(widths)[index_BL]
        return Decision(gate=(torch.arange(widths[-1]) < chosen[..., None]).float())

    rows = zip(space.choices.items(), indices_SBL, strict=True)
    return constant({site: mask(widths, index) for (site, widths), index in rows})


def gradients(decoder: Decoder, policy: Policy, tokens_BL, documents_BL=None, *, upstream=None):
    decoder.zero_grad()
    logits_BLV = decoder(tokens_BL, policy, documents_BL=documents_BL).logits_BLV
    (logits_BLV if upstream is None else logits_BLV * upstream).square().mean().backward()
    return logits_BLV.detach(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in decoder.named_parameters()
    }


@pytest.mark.parametrize("documents_BL", [None, DOCUMENTS_BL], ids=["plain", "documents"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "activation-checkpointing"])
def test_each_sequence_equals_its_own_run(decoder, space, tokens_BL, documents_BL, checkpointing):
    specs = [space.full(), space.smallest(), *(independent(space, Random(seed)) for seed in range(BATCH - 2))]
    indices_SB = torch.tensor([space.indices(spec) for spec in specs]).T
    decoder.activation_checkpointing = checkpointing
    together, grads = gradients(decoder, mixed(space, indices_SB), tokens_BL, documents_BL)
    decoder.activation_checkpointing = False
    expected = {}
    for row, spec in enumerate(specs):
        own_documents = None if documents_BL is None else documents_BL[row : row + 1]
        alone, own_grads = gradients(decoder, fixed(spec), tokens_BL[row : row + 1], own_documents)
        torch.testing.assert_close(together[row : row + 1], alone, **TOLERANCE)
        expected = {name: expected.get(name, 0) + grad / BATCH for name, grad in own_grads.items()}
    torch.testing.assert_close(grads, expected, **TOLERANCE)


@pytest.mark.parametrize("documents_BL", [None, DOCUMENTS_BL], ids=["plain", "documents"])
@pytest.mark.parametrize("reached", ["some", "none", "all"])
def test_each_token_equals_its_masked_self(decoder, space, tokens_BL, documents_BL, reached):
    """Also where a row reaches no wider band, so that its slots stay empty, or where one reaches all of them."""
    indices_SBL = draw_indices(space, (BATCH, LENGTH), seed=len(reached))
    if reached == "none":
        indices_SBL[:, 1] = 0
    if reached == "all":
        indices_SBL[:, 1] = torch.tensor([len(widths) - 1 for widths in space.choices.values()])[:, None]
    ran, grads = gradients(decoder, mixed(space, indices_SBL), tokens_BL, documents_BL)
    oracle, oracle_grads = gradients(decoder, masked_tokens(space, indices_SBL), tokens_BL, documents_BL)
    torch.testing.assert_close(ran, oracle, **TOLERANCE)
    torch.testing.assert_close(grads, oracle_grads, **TOLERANCE)


@pytest.mark.parametrize("index", [0, -1], ids=["all smallest", "all full"])
def test_one_choice_for_all_tokens(decoder, space, tokens_BL, index):
    spec = space.spec(dict.fromkeys(space.sites, index))
    chosen = torch.tensor(space.indices(spec))
    for shape in ((BATCH,), (BATCH, LENGTH)):
        indices = chosen.view(-1, *[1] * len(shape)).expand(-1, *shape)
        logits_BLV = decoder(tokens_BL, mixed(space, indices)).logits_BLV
        torch.testing.assert_close(logits_BLV, decoder(tokens_BL, fixed(spec)).logits_BLV, **TOLERANCE)


@pytest.mark.parametrize("per_token", [False, True], ids=["sequences", "tokens"])
def test_gates_of_bands(decoder, space, tokens_BL, per_token):
    """A gate of 1 changes nothing; one of 0 removes its band, as a narrower choice does."""
    shape = (BATCH, LENGTH) if per_token else (BATCH,)
    top = torch.tensor([len(widths) - 1 for widths in space.choices.values()])
    drawn = draw_indices(space, shape)
    full_indices = top.view(-1, *[1] * len(shape)).expand_as(drawn)

    def gated(indices: torch.Tensor, kept: torch.Tensor) -> Policy:
        decisions = {}
        for site, widths, index, keep in zip(space.sites, space.choices.values(), indices, kept, strict=True):
            gate = (torch.arange(len(widths)) <= keep[..., None]).float()
            decisions[site] = Decision(Width.per_row(widths, index), gate)
        return constant(decisions)

    plain = decoder(tokens_BL, mixed(space, drawn)).logits_BLV
    torch.testing.assert_close(decoder(tokens_BL, gated(drawn, drawn)).logits_BLV, plain, **TOLERANCE)
    torch.testing.assert_close(decoder(tokens_BL, gated(full_indices, drawn)).logits_BLV, plain, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # norms of queries keep their float32 weights under autocast
def test_masks_have_the_dtype_of_queries(decoder, space, tokens_BL, monkeypatch):
    """Kernels for GPUs read a mask of another one wrongly."""
    seen = []

    def spy(q, *rest, attn_mask=None, **named):
        seen.append(attn_mask is None or attn_mask.dtype == q.dtype)
        return attention(q, *rest, attn_mask=attn_mask, **named)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    indices_SBL = draw_indices(space, (BATCH, LENGTH))
    for documents_BL in (None, DOCUMENTS_BL):
        with torch.autocast("cpu", torch.bfloat16):
            decoder(tokens_BL, mixed(space, indices_SBL), documents_BL=documents_BL)
        deepcopy(decoder).bfloat16()(tokens_BL, mixed(space, indices_SBL), documents_BL=documents_BL)
    assert seen
    assert all(seen)


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:.*deterministic")
def test_no_gradient_is_left_unwritten(decoder, space, tokens_BL, monkeypatch):
    """What torch does not fill holds NaN here, and anomaly detection looks at every gradient."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            _, grads = gradients(decoder, mixed(space, draw_indices(space, (BATCH, LENGTH))), tokens_BL)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(grad.isfinite().all() for grad in grads.values())


def flops_of(decoder: Decoder, policy: Policy, tokens_BL: torch.Tensor) -> int:
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        decoder(tokens_BL, policy)
    return counter.get_total_flops()


def test_sequences_run_at_their_mean_flops(decoder, space, tokens_BL):
    indices_SB = draw_indices(space, (BATCH,))
    specs = [space.spec(dict(zip(space.sites, column, strict=True))) for column in indices_SB.T.tolist()]
    alone = sum(flops_of(decoder, fixed(spec), tokens_BL[:1]) for spec in specs)
    assert flops_of(decoder, mixed(space, indices_SB), tokens_BL) == alone


def new_cache(decoder: Decoder, batch: int = BATCH) -> KVCache:
    parameter = next(decoder.parameters())
    return KVCache(decoder.config, batch_size=batch, length=LENGTH + 4, device=parameter.device, dtype=parameter.dtype)


def cached_logits(decoder: Decoder, tokens_BL, policies, *, prompt: int, documents_BL=None) -> torch.Tensor:
    """Prompt in one call, then token by token; `policies(start, end)` is the policy of those positions."""
    cache, found = new_cache(decoder, len(tokens_BL)), []
    edges = [0, prompt, *range(prompt + 1, tokens_BL.shape[1] + 1)]
    for start, end in pairwise(edges):
        documents = None if documents_BL is None else documents_BL[:, start:end]
        found.append(
            decoder(tokens_BL[:, start:end], policies(start, end), documents_BL=documents, cache=cache).logits_BLV
        )
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize("documents_BL", [None, DOCUMENTS_BL], ids=["plain", "documents"])
def test_the_kv_cache_changes_nothing(decoder, space, tokens_BL, prompt, documents_BL):
    indices_SB, indices_SBL = draw_indices(space, (BATCH,)), draw_indices(space, (BATCH, LENGTH))
    spec = independent(space, Random(3))
    for whole, pieces in (
        (full, lambda start, end: full),
        (fixed(spec), lambda start, end: fixed(spec)),
        (mixed(space, indices_SB), lambda start, end: mixed(space, indices_SB)),
        (mixed(space, indices_SBL), lambda start, end: mixed(space, indices_SBL[:, :, start:end])),
    ):
        expected = decoder(tokens_BL, whole, documents_BL=documents_BL).logits_BLV
        got = cached_logits(decoder, tokens_BL, pieces, prompt=prompt, documents_BL=documents_BL)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("documents_BL", [None, DOCUMENTS_BL], ids=["plain", "documents"])
@pytest.mark.parametrize("per_token", [False, True], ids=["sequences", "tokens"])
def test_chunks_of_a_prompt(decoder, space, tokens_BL, documents_BL, per_token):
    cache, found = new_cache(decoder), []
    indices = draw_indices(space, (BATCH, LENGTH) if per_token else (BATCH,))
    for part in (slice(0, 5), slice(5, 9), slice(9, 12)):
        own = indices[:, :, part] if per_token else indices
        documents = None if documents_BL is None else documents_BL[:, part]
        found.append(decoder(tokens_BL[:, part], mixed(space, own), documents_BL=documents, cache=cache).logits_BLV)
    expected = decoder(tokens_BL, mixed(space, indices), documents_BL=documents_BL).logits_BLV
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_on_the_left_changes_no_logits(decoder, tokens_BL):
    padding = 3
    padded = torch.cat((torch.zeros(BATCH, padding, dtype=torch.long), tokens_BL), dim=1)
    documents_BL = (torch.arange(padded.shape[1]) >= padding).long().expand(BATCH, -1) - 1
    expected = decoder(tokens_BL).logits_BLV
    got = decoder(padded, documents_BL=documents_BL).logits_BLV[:, padding:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_width_zero_skips_a_site(decoder, space, tokens_BL):
    """As if the site's output, its bias included, were multiplied by 0: for all rows, or for some.

    Of a depth site that is all that the block adds.
    """
    base = decoder(tokens_BL).logits_BLV
    for site in space.sites:
        whole = space.choices[site][-1]
        silenced = deepcopy(decoder)
        block = silenced.blocks[site.layer]
        outputs = {"mlp_width": block.mlp.down, "attn_heads": block.attn.o}
        if site.axis in outputs and outputs[site.axis].bias is not None:
            outputs[site.axis].bias.zero_()
        silent = silenced(tokens_BL, constant({site: Decision(gate=torch.zeros(1, 1, whole))})).logits_BLV
        skipped = decoder(tokens_BL, constant({site: Decision(Width(0))})).logits_BLV
        torch.testing.assert_close(skipped, silent, **TOLERANCE)
        index_B = torch.tensor([0, 1, 1, 0, 1])
        wanted = torch.where(index_B[:, None, None] == 0, silent, base)
        for length in (tokens_BL.shape[1], 1):  # one token a sequence is served in another way
            some = decoder(
                tokens_BL[:, :length], constant({site: Decision(Width.per_row((0, whole), index_B))})
            ).logits_BLV
            torch.testing.assert_close(some, wanted[:, :length], **TOLERANCE)
