"""Chat templates on request: documents written as the exchanges that a chat model sees.

A document that holds messages (records ``{"role", "content"}`` in the named column, or prompt and
answer of a harness task) is written with them. Any other text becomes one exchange: its first line
is what the user says, the rest is the answer; a text of one line is the user's alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lm_calib_plugin.calibration.sources.base import Document
from lm_calib_plugin.calibration.tokens import encode
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.storage import digest

ARGUMENT = "chat_template"
DATE = "01 Jan 2025"  # some templates write today's date; a draw must not change with it


class Exchange(str):
    """A text that remembers the messages it is made of."""

    messages: tuple[dict[str, str], ...]

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], text: str | None = None) -> Exchange:
        """Make a text of messages; without ``text`` their contents joined by blank lines."""
        plain = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in messages)
        made = cls("\n\n".join(m["content"] for m in plain) if text is None else text)
        made.messages = plain
        return made


def are_messages(value: Any) -> bool:
    """Tell whether a value is a list of records with role and content, both text."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, Mapping)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
    )


def messages_of(text: str) -> tuple[dict[str, str], ...]:
    """Return the messages that a document holds, or the one exchange that is made of it."""
    if isinstance(text, Exchange):
        return text.messages
    question, _, answer = text.strip().partition("\n")
    said = ({"role": "user", "content": question.strip()},)
    reply = answer.strip()
    return (*said, {"role": "assistant", "content": reply}) if reply else said


class ChatWriter:
    """Writes documents with the chat template of a tokenizer, and counts what they were.

    Raises
    ------
    UserError
        When the tokenizer has no template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.counts = {"with_messages": 0, "split_at_first_line": 0, "user_only": 0}
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                ARGUMENT,
                "the tokenizer has no chat template",
                "tokenizers of instruct and chat models have one",
                "drop chat_template, or use another model",
            )
        # A start token in the template and one put by the tokenizer would be two.
        start = getattr(tokenizer, "bos_token", None)
        plain = encode(tokenizer, "a", special=True)
        twice = start is not None and plain[:1] == [tokenizer.bos_token_id]
        self._dropped = start if twice else ""

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents, written; empty ones stay empty."""
        for document in documents:
            if not document.text.strip():
                yield document
                continue
            messages = messages_of(document.text)
            known = isinstance(document.text, Exchange)
            kind = "split_at_first_line" if len(messages) > 1 else "user_only"
            self.counts["with_messages" if known else kind] += 1
            yield Document(document.number, self.written(document.text))

    def written(self, text: str) -> str:
        """Return one document as the template writes it."""
        if not text.strip():
            return text
        try:
            made: str = self.tokenizer.apply_chat_template(
                list(messages_of(text)),
                tokenize=False,
                add_generation_prompt=False,
                date_string=DATE,
            )
        except Exception as error:
            raise UserError(
                ARGUMENT,
                f"the template of this tokenizer refuses a document: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                "roles that the template knows, in the order it wants",
                "drop chat_template, or mend the messages",
            ) from None
        return made.removeprefix(self._dropped)

    def record(self) -> dict[str, Any]:
        """Return the digest of the template and how the documents were made."""
        return {"template": digest(str(self.tokenizer.chat_template)), **self.counts}
