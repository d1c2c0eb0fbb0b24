"""Export a model: write it to a hidden folder, check it, add the model card, and only then give it its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from nestlm.data.special_tokens import SpecialTokens
from nestlm.data.tokenizer import hash_tokenizer, load_tokenizer, parse_tokenizer
from nestlm.elastic.axes.base import Axis
from nestlm.elastic.surgery import extract
from nestlm.errors import ExportError
from nestlm.export import gguf_file, hf_folder
from nestlm.export.export_check import (
    LIMITS,
    ExportCheck,
    ExportReference,
    check_gguf_file,
    check_hf_folder,
    check_library,
)
from nestlm.export.exported_router import ExportedRouter
from nestlm.export.hub_upload import check_hub_token, upload_model
from nestlm.export.model_card import CardFacts, model_card
from nestlm.export.new_folder import check_can_be_made, naming_write_errors, new_folder
from nestlm.model.checkpoint import read_hf_config
from nestlm.model.family import Family
from nestlm.model.parent_files import TOKENIZER_JSON, ParentFiles
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import Policy, fixed
from nestlm.router.dynamic.plan import Plan
from nestlm.router.protocols import PlanningRouter
from nestlm.spec import SubnetSpec

Format = Literal["hf", "gguf"]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportSource:
    """The parts of a finished run that an export needs for any budget.

    Attributes:
        decoder: the whole model on the CPU, in float32 and evaluation mode.
        family: the family and sizes of the whole model.
        parent: the parent checkpoint's files that the run keeps; None: the model was trained from scratch.
        axes: the elastic axes.
        tokenizer: path of the run's tokenizer.json.
        special_tokens: ids of the tokens that begin and end a text.
        text_BL: token ids of text that the model was not trained on.
    """

    decoder: Decoder
    family: Family
    parent: ParentFiles | None
    axes: tuple[Axis, ...]
    tokenizer: Path
    special_tokens: SpecialTokens
    text_BL: Tensor


@dataclass(frozen=True)
class ExportChoice:
    """What to export of a run: one sub-network (`spec`), or a dynamic router with its plan (`routed`), never both."""

    spec: SubnetSpec | None = None
    routed: tuple[PlanningRouter, Plan] | None = None

    @property
    def policy(self) -> Policy:
        """The choice as an argument of the decoder."""
        if self.routed is not None:
            router, plan = self.routed
            return router.policy(plan)
        assert self.spec is not None, "one of both"
        return fixed(self.spec)


def export_model(
    nested: ExportSource,
    chosen: ExportChoice,
    out: Path,
    *,
    form: Format,
    precision: gguf_file.Precision | None,
    facts: CardFacts,
    push_to: str | None = None,
) -> ExportCheck:
    """Write a stand-alone model to a folder, and check that it computes what the nested model computes.

    Args:
        nested: the run's model.
        chosen: the sub-network or dynamic router to export.
        out: a folder that does not exist yet, or is empty; after an error other than the hub's nothing is left of it.
        form: `hf` for transformers, `gguf` for llama.cpp.
        precision: precision of the weights; None: the parent's, float32 for a model that was trained from scratch.
        facts: facts about the run for the model card.
        push_to: OWNER/NAME on the Hugging Face hub, to upload to a private repository; None: no upload.

    Raises:
        ExportError: the format cannot hold the model, the folder cannot be written, the check fails, or the hub refuses
            the upload.
    """
    check_form(chosen, form=form, precision=precision)
    routing = (
        None
        if chosen.routed is None
        else ExportedRouter.from_plan(*chosen.routed, axes=nested.axes, config=nested.decoder.config)
    )
    spec = chosen.spec if routing is None else routing.spec
    assert spec is not None, "a router has stored widths"
    small = extract(nested.decoder, spec, axes=nested.axes).eval()
    dtype = None if precision is None and nested.parent is not None else DTYPES.get(precision or "f32")
    precision = precision or parent_precision(nested.parent)
    question = ExportReference(
        wanted=lambda tokens_BL: nested.decoder(tokens_BL, chosen.policy).logits_BLV,
        decoder=nested.decoder,
        family=nested.family,
        text_BL=nested.text_BL,
        limit=LIMITS[form] if precision == "f32" else None,
    )
    with new_folder(out) as folder:
        if form == "gguf":
            path = folder / f"{out.name}-{precision}.gguf"
            told = {"tokenizer": nested.tokenizer, "texts": text_format(nested), "name": out.name}
            with naming_write_errors(out):
                gguf_file.write_gguf(small, nested.family, path, precision=precision, **told)
            check = check_gguf_file(path, question, small=small)
        else:
            with naming_write_errors(out):
                write_transformers_folder(small, nested, folder, dtype=dtype, routing=routing)
            check = check_transformers_folder(small, nested, folder, routing=routing, question=question)
        text = model_card(facts, small.config, check, routing=routing, form=form, precision=precision, name=out.name)
        with naming_write_errors(out):
            (folder / "README.md").write_text(text, encoding="utf-8")
    if push_to is not None:
        upload_model(out, push_to)
    return check


def write_transformers_folder(
    small: Decoder, nested: ExportSource, folder: Path, *, dtype: torch.dtype | None, routing: ExportedRouter | None
) -> None:
    """Write a model and its tokenizer into a folder that transformers opens.

    Args:
        small: the stored model.
        nested: the run's model, which `small` was cut from.
        folder: an empty folder.
        dtype: dtype of the weights; None: the parent's.
        routing: the dynamic router to store; None: the model has none.
    """
    brought = brings_tokenizer(nested)
    told = {"parent": nested.parent, "routing": routing, "dtype": dtype, "tokenizer": brought}
    hf_folder.write_hf_folder(small, nested.family, folder, **told)
    if not brought:
        write_tokenizer(nested, folder)


def check_transformers_folder(
    small: Decoder,
    nested: ExportSource,
    folder: Path,
    *,
    routing: ExportedRouter | None,
    question: ExportReference,
) -> ExportCheck:
    """Check a folder that `write_transformers_folder` wrote: first its code, then the logits that it computes.

    Args:
        small: the stored model.
        nested: the run's model.
        folder: the folder.
        routing: the stored dynamic router; None: the model has none.
        question: the model and text to compare with.

    Raises:
        ExportError: the folder holds foreign code, or its logits differ by more than the limit.
    """
    kind = hf_folder.modelling_file(small, nested.family, routing)
    hf_folder.check_code(folder, nested.family, kind)
    tokenizer = load_tokenizer(nested.tokenizer)
    return check_hf_folder(folder, question, runs_code=kind is not None, tokenizer=tokenizer)


def check_target(family: Family, out: Path, *, run: Path, form: str, push_to: str | None) -> None:
    """Check what can be checked before anything is computed.

    Args:
        family: the family to export.
        out: the folder to make.
        run: the run's folder.
        form: hf or gguf.
        push_to: OWNER/NAME on the hub, or None.

    Raises:
        ExportError: the folder cannot be made, a library is not installed, the format cannot hold the family, or the
            hub needs a token.
    """
    check_can_be_made(out, run=run)
    check_library(form)
    if form == "gguf":
        gguf_file.check_family_fits(family)
    if push_to is not None:
        check_hub_token(push_to)


def check_form(chosen: ExportChoice, *, form: str, precision: str | None) -> None:
    """Raise ExportError if the format cannot hold a dynamic router, or weights of this precision."""
    if form == "gguf":
        if chosen.routed is not None:
            raise ExportError(
                "export: llama.cpp runs one sub-network for all tokens, this router decides for each; "
                "try --format hf, or --router static"
            )
    elif precision is not None and precision not in DTYPES:
        raise ExportError(f"export: --dtype {precision} is of GGUF; wanted one of {', '.join(DTYPES)} with --format hf")


def parent_precision(parent: ParentFiles | None) -> gguf_file.Precision:
    """Return the precision of the parent checkpoint's weights: f16 or bf16 if only one of them occurs beside float32.

    Else, and without a parent, f32.
    """
    if parent is None:
        return "f32"
    found = set(hf_folder.parent_dtypes(parent).values()) - {torch.float32}
    names: dict[torch.dtype, gguf_file.Precision] = {torch.float16: "f16", torch.bfloat16: "bf16"}
    return names.get(found.pop(), "f32") if len(found) == 1 else "f32"


def brings_tokenizer(nested: ExportSource) -> bool:
    """Tell whether the run used its parent's tokenizer, compared by content, so that its files fit the export."""
    if nested.parent is None or TOKENIZER_JSON not in nested.parent.files:
        return False
    theirs = parse_tokenizer(nested.parent.files[TOKENIZER_JSON])
    return hash_tokenizer(theirs) == hash_tokenizer(load_tokenizer(nested.tokenizer))


def text_format(nested: ExportSource) -> gguf_file.TextFormat:
    """Return special tokens and chat templates: from the parent's files if the run used its tokenizer, else the run's.

    Without the parent's tokenizer there are no chat templates and no padding token.
    """
    begin, (end, *others) = nested.special_tokens.begin, nested.special_tokens.ends
    turn_end = others[0] if others else None
    if nested.parent is None or not brings_tokenizer(nested):
        return gguf_file.TextFormat(begin, end, turn_end)
    tokenizer = load_tokenizer(nested.tokenizer)
    pad = nested.parent.special_token("pad_token")
    pad_id = None if pad is None else tokenizer.token_to_id(pad)
    return gguf_file.TextFormat(
        begin,
        end,
        turn_end,
        pad=pad_id if pad_id is not None and pad_id < nested.family.vocab_size else None,
        adds_begin=tokenizer.encode("a").ids[:1] == [begin],
        chat_templates=nested.parent.chat_templates(),
    )


def write_tokenizer(nested: ExportSource, folder: Path) -> None:
    """Write the run's tokenizer as files that transformers opens, and its special tokens to the config files.

    The tokenizer puts the same token before a text as training did before a document.
    """
    tokenizer = load_tokenizer(nested.tokenizer)
    start, (main, *others) = nested.special_tokens.begin, nested.special_tokens.ends
    token = str(tokenizer.id_to_token(start))
    with_start(tokenizer, token, start).save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "eos_token": str(tokenizer.id_to_token(main)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": nested.family.context_length,
    }
    hf_folder.write_hf_json(folder / "tokenizer_config.json", settings)
    ids = {"bos_token_id": start, "eos_token_id": [main, *others] if others else main}
    hf_folder.write_hf_json(folder / "generation_config.json", ids)
    hf_folder.write_hf_json(folder / "config.json", read_hf_config(folder) | ids)


def with_start(tokenizer: Tokenizer, token: str, token_id: int) -> Tokenizer:
    """Return a copy of a tokenizer that puts `token` before a text, unless the tokenizer has a post-processor."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    if copy.post_processor is None:
        copy.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])
    return copy
