"""What a template makes of a record's turns, and what every template has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_core.data.records import IMAGE_MARK, Role, Turn
from llava_core.errors import BadRow


@dataclass(frozen=True)
class Span:
    """A piece of text; `trainable` says whether its tokens are targets."""

    text: str
    trainable: bool


@dataclass(frozen=True)
class ImageSlot:
    """The place of one image's visual tokens."""


@dataclass(frozen=True)
class Conversation:
    """A record as a template writes it.

    Attributes:
        pieces: text and image slots in order; no span is empty and no two neighbours are equally trainable.
        adds_bos: True if the tokenizer is to put its BOS in front; False where the text brings its own.
        adds_eos: True if the tokenizer's EOS is to follow, as a target.
    """

    pieces: tuple[Span | ImageSlot, ...]
    adds_bos: bool = True
    adds_eos: bool = False

    @property
    def text(self) -> str:
        """The whole text, each image slot shown as `<image>`."""
        return "".join(piece.text if isinstance(piece, Span) else IMAGE_MARK for piece in self.pieces)

    @property
    def num_images(self) -> int:
        return sum(isinstance(piece, ImageSlot) for piece in self.pieces)

    @property
    def is_prompt(self) -> bool:
        """True if nothing is to be trained: the text is there to be continued."""
        return not any(isinstance(piece, Span) and piece.trainable for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class Template(ABC):
    """How turns become text.

    Attributes:
        name: what a configuration calls it.
        stop: strings that end an answer; the tokenizer's EOS may be among them.
        adds_bos: see `Conversation`.
        image: how an image is written, `<image>` standing for its visual tokens.
        after_image: what separates an image from its message, which it is moved in front of, several as one; None
            leaves images where they are written.
        jinja: a chat template over `messages` that writes the same text, for exports; the built-in templates have
            theirs in `weights/chat_templates.py`.
    """

    name: str
    stop: tuple[str, ...]
    adds_bos: bool = True
    image: str = IMAGE_MARK
    after_image: str | None = "\n"
    jinja: str | None = None

    def render(self, turns: Sequence[Turn]) -> Conversation:
        """The training text. A leading assistant turn is dropped, once.

        Raises:
            BadRow: `role_order` if the roles do not alternate from human to a last assistant; `no_supervised_token` if
                every answer is empty; what the template itself refuses.
        """
        conversation = join_spans(self._spans(self._checked(turns, "assistant")), self.adds_bos)
        if conversation.is_prompt:
            raise BadRow("no_supervised_token", "every answer is empty; give the row an answer or remove it")
        return conversation

    def prompt(self, turns: Sequence[Turn]) -> Conversation:
        """The text up to where the assistant's next answer starts; `turns` ends with a human one.

        Raises:
            BadRow: `role_order` if the roles do not alternate from human to a last human.
        """
        spans = self._prompt_spans(self._checked(turns, "human"))
        return join_spans([replace(span, trainable=False) for span in spans], self.adds_bos)

    def _checked(self, turns: Sequence[Turn], last: Role) -> list[Turn]:
        """Turns that alternate from human to `last`, with their images in place (train.py, preprocess_multimodal)."""
        kept = turns[1:] if turns and turns[0].role == "assistant" else turns
        roles = [turn.role for turn in kept]
        expected = ["assistant" if index % 2 else "human" for index in range(len(kept))]
        if not kept or roles != expected or roles[-1] != last:
            found = ", ".join(turn.role for turn in turns) or "no turns"
            raise BadRow("role_order", f"expected human and assistant in alternation, {last} last; found {found}")
        return [replace(turn, text=self._with_image(turn.text)) for turn in kept]

    def _with_image(self, text: str) -> str:
        if IMAGE_MARK not in text:
            return text
        if self.after_image is None:
            return text.replace(IMAGE_MARK, self.image)
        return f"{self.image}{self.after_image}{text.replace(IMAGE_MARK, '').strip()}".strip()

    @abstractmethod
    def _spans(self, turns: Sequence[Turn]) -> list[Span]:
        """The text of checked turns."""

    def _prompt_spans(self, turns: Sequence[Turn]) -> list[Span]:
        """The original opens an answer by writing an empty one."""
        return self._spans([*turns, Turn("assistant", "")])


def check_image_count(conversation: Conversation, num_images: int) -> None:
    """Refuses a row whose text has another number of image slots than the row has images.

    Raises:
        BadRow: `image_count`.
    """
    if conversation.num_images != num_images:
        raise BadRow(
            "image_count",
            f"the text has room for {conversation.num_images} images and the row lists {num_images}; write one "
            f"{IMAGE_MARK} for each image, each in a turn of its own (marks in one turn become one, but for a template "
            "whose after_image is null)",
        )


def join_spans(spans: Sequence[Span], adds_bos: bool, adds_eos: bool = False) -> Conversation:
    """Cuts the spans at image marks and joins neighbours that are equally trainable."""
    pieces: list[Span | ImageSlot] = []
    for span in spans:
        for index, text in enumerate(span.text.split(IMAGE_MARK)):
            if index:
                pieces.append(ImageSlot())
            last = pieces[-1] if pieces else None
            if text and isinstance(last, Span) and last.trainable == span.trainable:
                pieces[-1] = Span(last.text + text, span.trainable)
            elif text:
                pieces.append(Span(text, span.trainable))
    return Conversation(tuple(pieces), adds_bos, adds_eos)
