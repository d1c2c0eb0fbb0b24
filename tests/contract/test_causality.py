"""No choice of any router depends on later tokens, on neighbours in a batch, on padding, or on a cache."""

from itertools import pairwise

import torch

from nestlm.nn.kv_cache import KVCache
from nestlm.router.calibration_data import CalibrationData
from nestlm.spec import Budget
from routers import CONFIG, DYNAMICS, EVERY, LENGTH, PROMPT, batches, choices


def wide(calibration: CalibrationData) -> CalibrationData:
    """In float64."""
    return CalibrationData(calibration.decoder.double(), calibration.batches)


@torch.no_grad()
@EVERY
def test_later_tokens_change_nothing_before_them(variant, calibration, deciding):
    policy = variant.router().find(Budget.from_share(0.9), calibration=calibration).policy
    tokens_BL = batches(3)[0].tokens_BL
    changed_BL = tokens_BL.clone()
    changed_BL[:, 10:] = (changed_BL[:, 10:] + 7) % 50
    one, other = (calibration.decoder(tokens, policy) for tokens in (tokens_BL, changed_BL))
    torch.testing.assert_close(one.logits_BLV[:, :10], other.logits_BLV[:, :10])
    assert not torch.allclose(one.logits_BLV[:, 10:], other.logits_BLV[:, 10:])
    for site, before in choices(one).items():
        assert torch.equal(before[:, :10], choices(other)[site][:, :10])


@torch.no_grad()
@DYNAMICS
def test_alone_together_padded_and_token_by_token(variant, calibration, deciding):
    """Equal choices in float64, and logits within 1e-4."""
    calibration = wide(calibration)
    router = variant.router().double()
    policy = router.find(Budget.from_share(0.9), calibration=calibration).policy
    tokens_BL = batches(3)[0].tokens_BL
    together = calibration.decoder(tokens_BL, policy)
    logits_BLV, chosen = together.logits_BLV, choices(together)
    assert any(index.unique().numel() > 1 for index in chosen.values()), "tokens differ"
    for row in range(len(tokens_BL)):
        alone = calibration.decoder(tokens_BL[row : row + 1], policy)
        torch.testing.assert_close(alone.logits_BLV, logits_BLV[row : row + 1], rtol=0, atol=1e-4)
        assert all(torch.equal(index, chosen[site][row : row + 1]) for site, index in choices(alone).items())
    padding = 5
    padded_BL = torch.cat((torch.zeros(4, padding, dtype=torch.long), tokens_BL), dim=1)
    documents_BL = (torch.arange(padded_BL.shape[1]) >= padding).long().expand(4, -1) - 1
    padded = calibration.decoder(padded_BL, policy, documents_BL=documents_BL)
    torch.testing.assert_close(padded.logits_BLV[:, padding:], logits_BLV, rtol=0, atol=1e-4)
    assert all(torch.equal(index[:, padding:], chosen[site]) for site, index in choices(padded).items())
    for prompt in (1, PROMPT + 3):
        cache = KVCache(CONFIG, batch_size=4, length=LENGTH, device=torch.device("cpu"), dtype=torch.float64)
        edges = [0, prompt, *range(prompt + 1, LENGTH + 1)]
        for start, end in pairwise(edges):
            piece = calibration.decoder(tokens_BL[:, start:end], policy, cache=cache)
            torch.testing.assert_close(piece.logits_BLV, logits_BLV[:, start:end], rtol=0, atol=1e-4)
            assert all(torch.equal(index, chosen[site][:, start:end]) for site, index in choices(piece).items())


@torch.no_grad()
@DYNAMICS
def test_in_float32_choices_are_equal_up_to_the_first_tie(variant, calibration, monkeypatch, deciding):
    """Alone, together or token by token: choices differ at most after the two best differed by less than 1e-4."""
    router = variant.router()
    router.networks.output_bias.add_(8.0)  # steps of values far from 0, where all choices tie; logits do not mind
    policy = router.find(Budget.from_share(0.9), calibration=calibration).policy
    tokens_BL = batches(3)[0].tokens_BL
    gaps: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "argmax", noting_gaps(gaps))
    together = calibration.decoder(tokens_BL, policy)
    monkeypatch.undo()
    assert gaps, "choices are argmaxes"
    # of a prompt one gap, (B,), of tokens one at each multiplier, (J, B, L)
    tied_BL = torch.stack(
        [(gap[:, None] if gap.ndim == 1 else gap.amin(0)).expand(4, LENGTH) < 1e-4 for gap in gaps]
    ).any(0)
    clear_B = (tied_BL.cumsum(1) == 0).sum(1).tolist()
    assert sum(clear_B) > 8, "some tokens come before any tie"
    for row, clear in enumerate(clear_B):
        cache = KVCache(CONFIG, batch_size=1, length=LENGTH, device=torch.device("cpu"), dtype=torch.float32)
        steps = [
            calibration.decoder(tokens_BL[row : row + 1, at : at + 1], policy, cache=cache) for at in range(LENGTH)
        ]
        alone = calibration.decoder(tokens_BL[row : row + 1], policy)
        for site, index in choices(together).items():
            assert torch.equal(choices(alone)[site][0, :clear], index[row, :clear])
            assert torch.equal(torch.cat([choices(step)[site][0] for step in steps])[:clear], index[row, :clear])
        logits_LV = together.logits_BLV[row, :clear]
        torch.testing.assert_close(alone.logits_BLV[0, :clear], logits_LV, rtol=0, atol=1e-4)
        by_token_LV = torch.cat([step.logits_BLV[0] for step in steps])[:clear]
        torch.testing.assert_close(by_token_LV, logits_LV, rtol=0, atol=1e-4)


def noting_gaps(gaps: list[torch.Tensor]):
    """`Tensor.argmax` that notes by how much the best of each row is ahead."""
    plain = torch.Tensor.argmax

    def argmax(scores: torch.Tensor, dim: int) -> torch.Tensor:
        best = scores.topk(2, dim).values
        gaps.append(best[..., 0] - best[..., 1])
        return plain(scores, dim)

    return argmax


@torch.no_grad()
@DYNAMICS
def test_a_ragged_batch_is_padded_on_the_left(variant, calibration, deciding):
    """Prompts of different lengths in one batch, then decoding: each row chooses as it would alone."""
    calibration = wide(calibration)
    policy = variant.router().double().find(Budget.from_share(0.9), calibration=calibration).policy
    tokens_BL = batches(4)[0].tokens_BL
    lengths, longest, steps = [3, 9, 6, 1], 9, 6
    cache = KVCache(CONFIG, batch_size=4, length=longest + steps, device=torch.device("cpu"), dtype=torch.float64)
    prompt_BL = torch.zeros(4, longest, dtype=torch.long)
    documents_BL = torch.full((4, longest), -1)
    for row, length in enumerate(lengths):
        prompt_BL[row, longest - length :] = tokens_BL[row, :length]
        documents_BL[row, longest - length :] = 0
    outputs = [calibration.decoder(prompt_BL, policy, documents_BL=documents_BL, cache=cache)]
    for step in range(steps):
        following = torch.stack([tokens_BL[row, length + step] for row, length in enumerate(lengths)])[:, None]
        outputs.append(
            calibration.decoder(following, policy, documents_BL=torch.zeros(4, 1, dtype=torch.long), cache=cache)
        )
    for row, length in enumerate(lengths):
        alone = calibration.decoder(tokens_BL[row : row + 1, : length + steps], policy)
        for site, index in choices(alone).items():
            found = torch.cat([choices(output)[site][row] for output in outputs])[longest - length :]
            assert torch.equal(found, index[0])
        logits = torch.cat([output.logits_BLV[row] for output in outputs])[longest - length :]
        torch.testing.assert_close(logits, alone.logits_BLV[0], rtol=0, atol=1e-4)
