"""Measure claim 8: tokens per second at half the cost, compared with the full model and with transformers.

OMP_WAIT_POLICY=PASSIVE python benchmarks/decode_speed.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers

from bench import Row, main
from dense_decoder import as_llama
from nestlm.cost.static import Flops
from nestlm.generation.generate import generate
from nestlm.generation.sampling import GREEDY
from nestlm.nn.policy import Policy, fixed, full
from shapes import Shape, no_grad
from turns import Spread, Way, ratio, take_turns

PROMPT, NEW = 16, 64


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Yield rows for greedy decoding of one sequence with a KV cache; the ideal ratio is that of FLOPs per token."""
    decoder = shape.decoder().eval()
    prompt = shape.batch.tokens_BL[:1, :PROMPT]

    def ours(policy: Policy) -> Way:
        settings = {"max_tokens": NEW, "sampling": GREEDY, "stop": frozenset()}
        return lambda: list(generate(decoder, prompt.tolist(), policy, **settings))

    llama = as_llama(decoder, shape).eval()
    llama.config.use_cache = True
    settings = transformers.GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    half = shape.half()
    ways = {
        "full": ours(full),
        "half": ours(fixed(half)),
        "transformers": no_grad(
            lambda: llama.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        ),
    }
    with torch.no_grad():
        made = [step[0] for step in ways["full"]()]
    assert made == ways["transformers"]()[0, PROMPT:].tolist(), "both continue alike"
    seconds = take_turns(ways, repeats=repeats)
    speeds = {name: Spread.of([NEW / turn for turn in turns]) for name, turns in seconds.items()}
    table = Flops(PROMPT + NEW).tabulate(shape.space, axes=shape.axes, config=shape.config)
    ideal = 1 / table.share(half)
    gain = ratio(seconds["full"], seconds["half"])
    yield Row(
        "8. decoding at half width, speed-up over the ideal", shape.name, gain / ideal,
        0.9 if shape.config.hidden_size >= 512 else 0.7,
        f"{speeds['half'].middle:.0f} tokens/s, whole {speeds['full'].middle:.0f}; ideal {ideal:.2f}", at_least=True,
    )  # fmt: skip
    yield Row(
        "8. whole model's tokens/s over transformers'", shape.name, ratio(seconds["transformers"], seconds["full"]),
        1.5, f"{speeds['full'].middle:.0f} and {speeds['transformers'].middle:.0f}", at_least=True,
    )  # fmt: skip


if __name__ == "__main__":
    main(rows)
