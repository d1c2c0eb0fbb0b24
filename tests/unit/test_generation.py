"""Generation: the cache, mixed budgets and padding change nothing; sampling; prompts that cannot be continued."""

from collections import Counter
from random import Random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from models import random_decoder
from nestlm.data.tokenizer import encode_prompt, make_text_encoder, train_tokenizer
from nestlm.errors import ConfigError, DataError
from nestlm.generation import generate as generation
from nestlm.generation.generate import generate
from nestlm.generation.rows import batch_policy
from nestlm.generation.sampling import GREEDY, Sampling
from nestlm.generation.text import TextStream, continuation
from nestlm.nn.policy import fixed
from nestlm.router.base import RoutedPolicy
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.dynamic.plan import Plan
from nestlm.spec import Budget
from routers import CONFIG, SPACE, Variant, batches

TIE = 1e-4  # logits nearer than this may come in another order
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1], [8, 2, 8, 1, 8, 4]]
TOKENS = 10
DECODER = random_decoder(CONFIG).eval()
VARIANTS = [Variant("surrogate", "dynamic"), Variant("value", "dynamic", "prompt")]
DRAWN = Sampling(temperature=1.5, top_p=0.95, seed=4)


def sub_network(seed: int) -> RoutedPolicy:
    generator = torch.Generator().manual_seed(seed)
    drawn = {site: int(torch.randint(len(SPACE.choices[site]), (), generator=generator)) for site in SPACE.sites}
    spec = SPACE.spec(drawn)
    return RoutedPolicy(fixed(spec), spec)


@torch.no_grad()
def dynamic(variant: Variant, share: float) -> RoutedPolicy:
    """Return a policy under which tokens differ: the first plan that a router tries for a budget."""
    router, calibration = variant.router(), CalibrationData(DECODER, batches(1, count=1))
    bounds = router.planned.bounds(Budget.from_share(share))
    start = Plan(router.budget_feature(bounds), router.fixed_point_prices(bounds))
    scores = router.record(start, calibration)
    plan, _ = router.refine(start, scores, bounds=bounds, calibration=calibration, gain_threshold=0.0)
    assert len(plan.fixed) < len(SPACE.sites)
    return RoutedPolicy(router.policy(plan), plan=plan.to_json())


@pytest.fixture(scope="module", params=["static", *VARIANTS], ids=str)
def mixtures(request) -> list[list[RoutedPolicy]]:
    """Batches of policies, one a prompt: sub-networks, policies under which tokens differ, or both in one batch."""
    subs = [sub_network(seed) for seed in range(4)]
    if request.param == "static":
        return [subs, [subs[0], subs[1], subs[0], subs[1]], [subs[2]] * 4]
    high, low = (dynamic(request.param, share) for share in (0.9, 0.8))
    return [[high, low, low, high], [low, subs[0], high, subs[1]]]


def run(prompts, answers, *, sampling: Sampling = GREEDY, stop=frozenset(), max_tokens=TOKENS) -> list[list[int]]:
    policy = batch_policy(answers, space=SPACE, device=torch.device("cpu"))
    steps = list(generate(DECODER, prompts, policy, max_tokens=max_tokens, sampling=sampling, stop=stop))
    return [[token for step in steps if (token := step[row]) is not None] for row in range(len(prompts))]


@torch.no_grad()
def test_greedy_output_is_that_of_uncached_forward_passes_of_each_row_alone(mixtures):
    for answers in mixtures:
        for prompt, answer, row in zip(PROMPTS, answers, run(PROMPTS, answers), strict=True):
            assert len(row) == TOKENS
            logits_LV = DECODER(torch.tensor([prompt + row[:-1]]), answer.policy).logits_BLV[0, len(prompt) - 1 :]
            lost_L = logits_LV.max(-1).values - logits_LV.gather(1, torch.tensor(row)[:, None])[:, 0]
            assert float(lost_L.max()) < TIE


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_each_row_of_a_mixed_batch_is_what_it_is_alone(mixtures, sampling):
    for answers in mixtures:
        alone = [run([prompt], [answer], sampling=sampling)[0] for prompt, answer in zip(PROMPTS, answers, strict=True)]
        assert run(PROMPTS, answers, sampling=sampling) == alone


def test_padding_is_never_seen(mixtures, monkeypatch):
    """The token ids of padding change no number."""
    expected = [run(PROMPTS, answers, sampling=DRAWN) for answers in mixtures]
    padded = generation.left_padded

    def with_other_padding(prompts, *, device):
        tokens_BL, documents_BL = padded(prompts, device=device)
        return torch.where(documents_BL < 0, 49, tokens_BL), documents_BL

    monkeypatch.setattr(generation, "left_padded", with_other_padding)
    assert [run(PROMPTS, answers, sampling=DRAWN) for answers in mixtures] == expected


def test_a_batch_of_one_answer_runs_sliced():
    answer = sub_network(0)
    twin = RoutedPolicy(fixed(answer.spec), answer.spec)
    assert batch_policy([answer, twin], space=SPACE, device=torch.device("cpu")) is answer.policy


def test_rows_end_at_a_stop_token_and_the_others_go_on():
    answers = [sub_network(0)] * 4
    rows = run(PROMPTS, answers, sampling=DRAWN)
    stop = rows[0][3]
    assert rows[0][-1] != stop
    wanted = [row[: row.index(stop)] if stop in row else row for row in rows]
    assert wanted != rows
    assert run(PROMPTS, answers, sampling=DRAWN, stop={stop}) == wanted
    assert run(PROMPTS, answers, stop=set(range(50))) == [[]] * 4, "nothing is left to do"


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits_BV = torch.tensor([[2.0, 0.0, 1.0, -1.0, 1.5]])
    chances = torch.softmax(logits_BV[0] / 0.7, -1)
    seen = Counter(int(Sampling(temperature=0.7, seed=seed).pick(logits_BV, number=3)) for seed in range(2000))
    for token, chance in enumerate(chances.tolist()):
        assert seen[token] / 2000 == pytest.approx(chance, abs=0.03)
    kept = {int(Sampling(temperature=1.0, top_p=0.7, seed=seed).pick(logits_BV, number=0)) for seed in range(200)}
    assert kept == {0, 4}, "0.45 and 0.27 of the probability reach 0.7"
    assert int(Sampling(temperature=1.0, top_p=1e-9).pick(logits_BV, number=0)) == 0
    assert int(GREEDY.pick(logits_BV, number=0)) == 0


def test_numbers_that_sampling_cannot_take():
    for wrong in ({"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: got .*, wanted"):
            Sampling(**wrong)


def test_a_prompt_may_fill_the_context_and_no_more():
    answers, room = [sub_network(0)], CONFIG.context_length
    assert len(run([[1] * (room - TOKENS)], answers)[0]) == TOKENS
    with pytest.raises(
        DataError, match=r"prompt: has 23 tokens.*wanted at most model.context_length=32; ask for at most 9"
    ):
        run([[1] * (room - TOKENS + 1)], answers)
    with pytest.raises(DataError, match=r"has 40 tokens.*=32; shorten it by 18"):
        run([[1] * 40], answers)
    with pytest.raises(ConfigError, match="max_tokens: got 0, wanted 1 or more"):
        run([[1]], answers, max_tokens=0)


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return make_text_encoder(train_tokenizer(["the cat and the hat"] * 9, vocab_size=264))


def test_prompts_that_a_tokenizer_cannot_say(byte_level):
    text = "the é日🙂\n\t<|endoftext|>"
    assert byte_level.decode(encode_prompt(byte_level, text, begin=0)[1:]) == text
    assert encode_prompt(byte_level, "", begin=0) == [0]
    with pytest.raises(DataError, match=r"prompt: 'a.udcff' is no Unicode text"):
        encode_prompt(byte_level, "a\udcff", begin=0)
    few = {"<s>": 0, "a": 1, "b": 2}
    for model in (models.BPE(few, []), models.WordLevel(few, unk_token="b")):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        assert encode_prompt(tokenizer, "a  a", begin=0) == [0, 1, 1]
        with pytest.raises(DataError, match="prompt: the tokenizer has no token for 'é', 'c'; leave it out"):
            encode_prompt(tokenizer, "a é a c", begin=0)
        with pytest.raises(DataError, match="leave it out") as found:
            encode_prompt(tokenizer, "é" * 9999, begin=0)
        assert len(str(found.value)) < 200


def test_text_is_streamed_in_whole_characters(byte_level):
    """Of a tokenizer of bytes, and of one that writes the space before a word, but not before the first."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "▁a": 1, "▁b": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    for tokenizer, text, broken in ((byte_level, " né日🙂 the", [163, 163]), (words, "b a", [])):
        prompt = encode_prompt(tokenizer, "a", begin=0)
        tokens = encode_prompt(tokenizer, text, begin=0)[1:] + broken
        stream = TextStream(tokenizer, prompt)
        pieces = [stream.add(token) for token in tokens]
        whole = continuation(tokenizer, prompt, tokens)
        assert "".join(pieces) + stream.rest() == whole
        assert not any("�" in piece for piece in pieces)
        assert whole.startswith(" ")
        assert "".join(pieces).strip() == text.strip()


def test_bytes_of_any_order_are_streamed():
    """A tokenizer of SentencePiece's kind, whose decoder replaces all bytes of a run where one of them is wrong."""
    vocabulary = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)} | {"▁a": 258, "b": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    source = Random(0)
    for text in ("é", "\n\n", "\n\n\xff", "日b", "é\xffb"):
        run = [byte + 2 for byte in (text.encode() if "\xff" not in text else text.encode("latin1"))]
        check_stream(tokenizer, [1, 258], [259, *run, 258, *run])
    for length in (5, 20, 300):
        for _ in range(5):
            check_stream(tokenizer, [1, 258, 259], [259, *(source.randrange(2, 260) for _ in range(length))])
    check_stream(tokenizer, [1], [259, 400, 259])  # the embedding may have more rows than the tokenizer has tokens


def check_stream(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> None:
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) + stream.rest() == continuation(tokenizer, prompt, tokens)
    assert any(pieces)
