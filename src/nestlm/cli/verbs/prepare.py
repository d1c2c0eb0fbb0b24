"""`nestlm prepare`: texts to shards of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    source: Annotated[
        str, typer.Argument(help="A folder of text files, one text file, or hf:NAME[:CONFIG][:SPLIT].", metavar="SRC")
    ],
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder that holds one.")],
    out: Annotated[Path, typer.Option(help="The folder to write: a new one, or one that an ended command left.")],
    text_key: Annotated[str, typer.Option(help="The JSON key or the column that holds the text.")] = "text",
    heldout_share: Annotated[
        float, typer.Option(help="Share of the bytes for calibration, and again for validation.")
    ] = 0.02,
    shard_tokens: Annotated[int, typer.Option(help="The most tokens of a shard.")] = 2**26,
    begin_token: Annotated[
        str | None,
        typer.Option(help="The token before each document. Default: the one that the tokenizer's files name."),
    ] = None,
    end_token: Annotated[
        list[str] | None,
        typer.Option(help="A token that ends a text; may be repeated, the main one first. Default: likewise."),
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Read names of special tokens in texts as special tokens.")
    ] = False,
) -> None:
    """Tokenize texts and pack the tokens into shards, which `data.path=FOLDER` reads.

    A command that was killed goes on after its last full shard when it is given again.

    Example: nestlm prepare corpus --tokenizer llama2/tokenizer.json --out prepared
    """
    from nestlm.cli.prepare_folder import prepare_folder
    from nestlm.data.special_tokens import SpecialTokenSettings

    prepare_folder(
        source,
        out,
        tokenizer=tokenizer,
        text_key=text_key,
        heldout_share=heldout_share,
        shard_tokens=shard_tokens,
        special=SpecialTokenSettings(begin_token, end_token, special_tokens),
    )
