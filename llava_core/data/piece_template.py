"""Templates that are data: a YAML file that says which pieces of text a conversation is made of.

    start: ["Answer the questions.\\n"]                          # before the first message; may be left out
    human: ["USER:", " {text} "]                                # every human message
    assistant: ["ASSISTANT:", {train: " {text}</s>"}]           # every answer; what follows `train` is what is learnt
    stop: ["</s>"]                                              # what ends an answer, besides the tokenizer's eos

`{text}` stands for the message; a piece that holds it is left out where the message is empty. What comes before it in
`assistant` opens an answer that is to be generated. Further keys: `first_human` in place of `human` for the first
message, `strip: true` for messages without white space around them, `bos: false` where the tokenizer's BOS is not to
be put in front, `needs_question: true` to refuse rows whose first message is empty; `image`, how an image is written
(`<image>`, around which tokens may stand), and `after_image`, what separates it from the message that it is moved in
front of (a line break), where `null` leaves images where the messages have them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from llava_core.data.conversation import Span, Template
from llava_core.data.records import IMAGE_MARK, Turn
from llava_core.errors import BadRow, ConfigError

MESSAGE = "{text}"
FILE_SUFFIXES = (".yaml", ".yml")
PLACEHOLDER = re.compile(r"\{\w+\}")


@dataclass(frozen=True, kw_only=True)
class PieceTemplate(Template):
    """See the file's docstring; make one with `read_template`.

    Attributes:
        start: before the first message.
        first_human: of the first human message.
        human: of each of the others.
        assistant: of an answer.
        strip: take the white space around messages away.
        needs_question: the first human message must not be empty.
    """

    start: tuple[Span, ...]
    first_human: tuple[Span, ...]
    human: tuple[Span, ...]
    assistant: tuple[Span, ...]
    strip: bool
    needs_question: bool

    @property
    def opening(self) -> tuple[Span, ...]:
        """What is written of an answer before its text."""
        return self.assistant[: next(i for i, piece in enumerate(self.assistant) if MESSAGE in piece.text)]

    def _spans(self, turns: Sequence[Turn]) -> list[Span]:
        texts = [turn.text.strip() if self.strip else turn.text for turn in turns]
        if self.needs_question and not texts[0]:
            raise BadRow("empty_turn", f"`{self.name}` needs words or an image in the first question")
        spans = list(self.start)
        for index, (turn, text) in enumerate(zip(turns, texts, strict=True)):
            human = self.human if index else self.first_human
            pieces = human if turn.role == "human" else self.assistant
            spans += [Span(p.text.replace(MESSAGE, text), p.trainable) for p in pieces if text or MESSAGE not in p.text]
        return spans

    def _prompt_spans(self, turns: Sequence[Turn]) -> list[Span]:
        return [*self._spans(turns), *self.opening]


def template_file(name: str) -> Path | None:
    """The file that a template's name is the path of; None for a name, which has no suffix."""
    return Path(name).expanduser() if name.lower().endswith(FILE_SUFFIXES) else None


def read_template(path: Path) -> PieceTemplate:
    """The template that a YAML file says, named after it.

    Raises:
        ConfigError: the file cannot be read, or listing what is wrong with each key.
    """
    try:
        return parse_template(path.read_text(encoding="utf-8"), path.stem, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the template {path} cannot be read: {error}") from error


def parse_template(text: str, name: str, where: str) -> PieceTemplate:
    """The template of a file's text. Raises ConfigError, which names the file as `where`."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the template {where} is no YAML: {error}") from error
    if not isinstance(found, dict):
        keys = ", ".join(_File.model_fields)
        raise ConfigError(f"the template {where} is {type(found).__name__}; expected a mapping of {keys}.")
    try:
        file = _File.model_validate({str(key): value for key, value in found.items()})
    except ValidationError as error:
        problems = "".join(f"\n  {_explain(problem)}" for problem in error.errors())
        raise ConfigError(f"the template {where} cannot be used:{problems}") from error
    return PieceTemplate(
        name=name,
        stop=file.stop,
        adds_bos=file.bos,
        start=file.start,
        first_human=file.human if file.first_human is None else file.first_human,
        human=file.human,
        assistant=file.assistant,
        image=file.image,
        after_image=file.after_image,
        strip=file.strip,
        needs_question=file.needs_question,
    )


def _piece(value: Any) -> Span:
    trainable = isinstance(value, dict) and value.keys() == {"train"}
    text = value["train"] if trainable else value
    if not isinstance(text, str) or not text:
        raise ValueError('expected a text, or {train: "a text"}')
    unknown = [mark for mark in PLACEHOLDER.findall(text) if mark != MESSAGE]
    if unknown:
        raise ValueError(f"{unknown[0]} means nothing here; {MESSAGE} stands for the message")
    return Span(text, trainable)


Pieces = tuple[Annotated[Span, BeforeValidator(_piece)], ...]


class _File(BaseModel):
    """The keys of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    start: Pieces = ()
    first_human: Pieces | None = None
    human: Pieces
    assistant: Pieces
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    bos: bool = True
    strip: bool = False
    needs_question: bool = False
    image: str = IMAGE_MARK
    after_image: str | None = "\n"

    @field_validator("image")
    @classmethod
    def _one_image(cls, text: str) -> str:
        if (count := text.count(IMAGE_MARK)) != 1:
            raise ValueError(f"expected {IMAGE_MARK} once, found it {count} times")
        if text != text.strip():
            raise ValueError("expected no white space around it: messages begin and end without")
        return text

    @field_validator("after_image")
    @classmethod
    def _no_image(cls, text: str | None) -> str | None:
        if text is not None and IMAGE_MARK in text:
            raise ValueError(f"expected what follows an image, without {IMAGE_MARK}")
        return text

    @field_validator("start", "first_human", "human", "assistant", "stop", mode="before")
    @classmethod
    def _a_list(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("expected a list")
        return tuple(value)

    @field_validator("start")
    @classmethod
    def _no_message(cls, pieces: Pieces) -> Pieces:
        if any(MESSAGE in piece.text for piece in pieces):
            raise ValueError(f"there is no message yet that {MESSAGE} could stand for")
        return pieces

    @field_validator("first_human", "human", "assistant")
    @classmethod
    def _one_message(cls, pieces: Pieces | None) -> Pieces | None:
        count = sum(piece.text.count(MESSAGE) for piece in pieces or ())
        if pieces is not None and count != 1:
            raise ValueError(f"expected {MESSAGE} once, found it {count} times")
        return pieces

    @field_validator("assistant")
    @classmethod
    def _trained(cls, pieces: Pieces) -> Pieces:
        if not any(piece.trainable and MESSAGE in piece.text for piece in pieces):
            raise ValueError(f"nothing would be learnt: write the piece with {MESSAGE} as {{train: …}}")
        return pieces


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, _File.model_fields, n=1, cutoff=0.5)
        keys = f"Did you mean {close[0]!r}?" if close else f"Keys: {', '.join(_File.model_fields)}."
        return f"{key}: no such key. {keys}"
    if problem["type"] == "missing":
        return f"{key}: not there; expected a list of pieces."
    return f"{key} = {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}."
