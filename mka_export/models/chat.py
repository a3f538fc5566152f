"""Chat templates: Jinja programs that a stranger wrote, so they run in a sandbox only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from mka_export.child import Child

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]  # turns, each with its role and its content
PATIENCE = 300.0  # seconds for a template, which may well loop for ever; a busy machine is slow to load the library
_SHOWN = 160  # characters of an error


@dataclass(frozen=True)
class Rendered:
    """A conversation as a model is to read it, up to where its answer begins.

    Attributes:
        text: the conversation; empty where there is an error.
        error: why the template did not render it, in one line; None where it did.
    """

    text: str
    error: str | None = None

    @classmethod
    def refused(cls, error: Exception) -> Rendered:
        """Return what came of a template that raised ``error``."""
        said = " ".join(str(error).split())[:_SHOWN]
        return cls("", f"{type(error).__name__}: {said}" if said else type(error).__name__)


def render(template: str, special: Mapping[str, str], conversations: Sequence[Conversation]) -> list[Rendered]:
    """Render conversations by a chat template, in transformers' sandbox.

    The sandbox keeps it from running code, not from computing for ever: call this in a process that may be killed.

    Args:
        template: the Jinja text.
        special: what it may call by name: ``bos_token``, ``eos_token`` and others.
    """
    return [_render(template, special, conversation) for conversation in conversations]


def render_apart(
    what: str, template: str, special: Mapping[str, str], conversations: Sequence[Conversation]
) -> list[Rendered]:
    """Do what ``render`` does in a process of its own, once for each template: a process that takes a second to start.

    Args:
        what: whose template it is, for the message.

    Raises:
        RuntimeFailure: it takes more time or memory than a template may.
    """
    return list(_rendered_apart(what, json.dumps([template, dict(special), conversations])))


@cache
def _rendered_apart(what: str, arguments: str) -> list[Rendered]:
    with Child(f"the chat template of {what}", _serve, *json.loads(arguments), patience=PATIENCE) as child:
        rendered: list[Rendered] = child.receive()
        return rendered


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a tokenizer's chat template, of several the one called ``default``; None if it has none."""
    found = tokenizer.chat_template
    return (found.get("default") if isinstance(found, dict) else found) or None


def _render(template: str, special: Mapping[str, str], conversation: Conversation) -> Rendered:
    from transformers.utils import chat_template_utils

    in_sandbox: Any = chat_template_utils.render_jinja_template  # its types are wrong
    try:
        texts, _ = in_sandbox([conversation], chat_template=template, add_generation_prompt=True, **special)
    except Exception as error:  # a template raises what it likes, and some refuse a conversation by that
        return Rendered.refused(error)
    return Rendered(texts[0])


def _serve(
    connection: Connection, template: str, special: Mapping[str, str], conversations: Sequence[Conversation]
) -> None:
    connection.send(render(template, special, conversations))
