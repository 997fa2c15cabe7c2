"""`edgeguard prompt`: exactly what a model would read, without running one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeguard import profiles
from edgeguard.answers import Answers
from edgeguard.cli.check import ModelOption
from edgeguard.cli.console import terminal, warn, write, write_json
from edgeguard.cli.inputs import MessagesOption, NeutraliseOption, PolicyOption, RoleOption, TextArgument, given
from edgeguard.conversation import Conversation
from edgeguard.errors import ModelFileError
from edgeguard.policy import Policy
from edgeguard.prompt import render
from edgeguard.store import Artifact, resolve
from edgeguard.tokenizer import GgufTokenizer, JsonTokenizer, Tokenizer


def prompt(
    text: TextArgument = None,
    messages: MessagesOption = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help=f"{', '.join(profiles.NAMES)}. The model's own, or llama-guard-2.")
    ] = None,
    role: RoleOption = None,
    policy: PolicyOption = None,
    neutralise: NeutraliseOption = False,
    ids: Annotated[bool, typer.Option("--ids", help="Print the token ids as a JSON list; needs --model or --tokenizer.")] = False,
    model: ModelOption = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json or a .gguf.")] = None,
) -> None:
    """Print exactly what the model would read, byte for byte; no model is needed."""
    asked = given(text, messages)
    found = None if model is None else resolve(model, ("onnx", "gguf", "hf"))
    own_profile = found.manifest.profile if isinstance(found, Artifact) else "llama-guard-2"
    chosen = profiles.get(own_profile if profile is None else profile)
    own = None if policy is None else Policy.load(policy, profile=chosen)
    rendered = render(chosen, Conversation.of(asked, role), own, neutralise=neutralise)
    warn(rendered.warnings)
    if not ids:
        write(rendered.text + chosen.lead_in, end="\n" if terminal(sys.stdout) else "")
    elif place := tokenizer or (found and found.tokenizer):
        reader = load_tokenizer(place)
        codes = [category.code for category in (own or chosen.policy).categories]
        write_json([*reader.encode(rendered.segments), *Answers.build(chosen, codes, reader).lead_in])
    else:
        raise typer.BadParameter("--ids needs --model or --tokenizer.")


def load_tokenizer(path: Path) -> Tokenizer:
    """Of a tokenizer.json (or the folder it is in) or a GGUF; raises `ModelFileError`."""
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ModelFileError(f"{path} does not exist; a tokenizer.json or a .gguf is needed.")
    if path.suffix != ".gguf":
        return JsonTokenizer.load(path)
    try:
        return GgufTokenizer.load(path)
    except ModelFileError:
        from edgeguard.gguf_check import check_gguf

        check_gguf(path)  # llama.cpp only says that it failed; a file of nothing but a vocabulary is no model, yet enough here
        raise
