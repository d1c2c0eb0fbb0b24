"""Write the model card of an export: its budget, sizes, losses and origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nestlm.export.export_check import ExportCheck
from nestlm.export.exported_router import ExportedRouter
from nestlm.nn.config import DecoderConfig


@dataclass(frozen=True)
class CardFacts:
    """Facts from a run that the model card states about an export.

    Attributes:
        budget: the budget as the user wrote it.
        achieved: cost of the export by kind of cost: an amount with its unit, and the share of the whole model's.
        router: name of the router that chose the export's widths.
        parent: name of the model that was made nested.
        fingerprint: fingerprint of the training text.
        commit: git commit of nestlm; None: unknown.
        losses: losses on the validation text, nats per token, by name of the scored model.
    """

    budget: str
    achieved: Mapping[str, tuple[str, float]]
    router: str
    parent: str
    fingerprint: str
    commit: str | None
    losses: Mapping[str, float]


OPENING = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
```""",
    "gguf": "```bash\nllama-cli --model {name}-{precision}.gguf\n```",
}


def model_card(
    facts: CardFacts,
    config: DecoderConfig,
    check: ExportCheck,
    *,
    routing: ExportedRouter | None,
    form: str,
    precision: str,
    name: str,
) -> str:
    """Return the text of README.md, a model card as the Hugging Face hub reads it.

    Args:
        facts: facts from the run.
        config: sizes of the stored model.
        check: the comparison of the export with the nested model.
        routing: the stored dynamic router; None: all tokens run the same widths.
        form: hf or gguf.
        precision: precision of the weights.
        name: name of the model.
    """
    plain = routing is None and len(set(config.blocks)) == 1
    library = "transformers" if form == "hf" else "gguf"
    base = f"base_model: {facts.parent}\n" if facts.parent.count("/") == 1 and " " not in facts.parent else ""
    costs = [f"| {kind} | {amount} | {share:.2%} |" for kind, (amount, share) in facts.achieved.items()]
    losses = [f"| {what} | {loss:.4f} |" for what, loss in facts.losses.items()]
    opening = OPENING[form].format(name=name, precision=precision, trust="" if plain else ", trust_remote_code=True")
    return "\n".join([
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\n{base}tags:\n- nested\n---\n",
        f"# {name}\n",
        f"A sub-network of {facts.parent}, made nested with nestlm; {describe_router(routing)}.\n",
        opening,
        f"\n## Budget\n\nAsked for: {facts.budget}. Found by: {facts.router}.\n",
        "| cost | achieved | of the whole model |\n|---|---|---|",
        *costs,
        f"\n## Sizes\n\n{check.parameters:,} parameters of {check.full_parameters:,}, in {precision}; "
        f"{check.size / 1e6:,.1f} MB.\n",
        *size_rows(config, routing),
        "\n## Losses\n\nNats a token.\n\n| | loss |\n|---|---|",
        *losses,
        f"| this export, on {check.tokens:,} tokens of the validation text | {check.loss:.4f} |",
        f"| the whole model, on the same | {check.full_loss:.4f} |",
        f"\nLargest difference of logits to the nested model: {check.difference:.1e} in {check.library}.",
        *check.notes,
        f"\n## Origin\n\nParent: {facts.parent}. Fingerprint of the text: `{facts.fingerprint}`. "
        f"Commit of nestlm: `{facts.commit}`.\n",
    ])  # fmt: skip


def describe_router(routing: ExportedRouter | None) -> str:
    """Describe in half a sentence whether tokens run fixed widths, or a router decides for them."""
    if routing is None:
        return "all tokens run the same sizes"
    over = "each prompt" if routing.config["prompt_tokens"] else "each token"
    return f"at {len(routing.config['sites'])} places it decides for {over} how wide it runs, within the budget"


def size_rows(config: DecoderConfig, routing: ExportedRouter | None) -> list[str]:
    """Return the lines of a Markdown table with a row for each layer: stored widths, and widths to choose from."""
    chosen: dict[int, dict[str, str]] = {}
    for site in [] if routing is None else routing.config["sites"]:
        chosen.setdefault(site["layer"], {})[site["axis"]] = ", ".join(map(str, site["widths"]))
    lines = ["| layer | query heads | KV groups | MLP width |" + (" chosen by tokens |" if chosen else "")]
    lines.append("|---" * (5 if chosen else 4) + "|")
    for layer, block in enumerate(config.blocks):
        cells = [str(layer), str(block.num_heads), str(block.num_kv_groups), str(block.mlp_width)]
        if chosen:
            cells.append("; ".join(f"{axis}: {widths}" for axis, widths in chosen.get(layer, {}).items()))
        lines.append("| " + " | ".join(cells) + " |")
    return lines
