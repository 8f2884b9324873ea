"""A model with all that it takes to ask it: tokenizer, image processor, template and end marks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from PIL import Image

from llava_core.backend import OpSet
from llava_core.data.batch import Example
from llava_core.data.conversation import Template, check_image_count
from llava_core.data.examples import Rejected
from llava_core.data.image_side import ImageSide
from llava_core.data.image_store import MAX_WORKING_PIXELS, ImageStore
from llava_core.data.images import ImageProcessor
from llava_core.data.records import Turn
from llava_core.data.tokens import encode
from llava_core.errors import BadRow, ConfigError, WeightsError
from llava_core.inference.chat_template import build_prompt, folder_template
from llava_core.inference.generate import Stop, generate
from llava_core.inference.prompts import Answer, Finish, PromptRow, mark_image
from llava_core.inference.sampling import GenerationSettings
from llava_core.model.llava import Llava
from llava_core.model.spec import ModelSpec
from llava_core.weights.load import load_model
from llava_core.weights.processor import load_processor
from llava_core.weights.source import from_folder
from llava_core.weights.tokenizer import load_tokenizer
from llava_core.weights.vocabulary import bare_mark, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Picture: TypeAlias = str | Path | Image.Image


class Assistant:
    """Answers questions with a model.

    Args:
        image_processor: None for a language model.
        template: writes the prompts; the one that the model was trained with.
        stop_ids: tokens that end an answer, besides eos and the template's end marks.
    """

    def __init__(
        self,
        model: Llava,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: ImageProcessor | None,
        template: Template,
        stop_ids: Iterable[int] = (),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        vision = model.spec.vision
        self.images = ImageSide(image_processor, vision.visual_tokens) if image_processor and vision else None
        self.template = template
        self.stop = build_stop(tokenizer, template, stop_ids)

    @classmethod
    def load(
        cls,
        folder: Path,
        build_ops: Callable[[ModelSpec], OpSet],
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        template: Template | None = None,
    ) -> Assistant:
        """The assistant of a Hugging Face folder: an export, another LLaVA, or a language model.

        Args:
            build_ops: chooses kernels for the folder's model, on the opened `device`.
            template: in place of the folder's own chat template.

        Raises:
            ConfigError: no template is given and the folder has none, or its image processor cannot be honoured.
            WeightsError: the folder's weights or config cannot be used.
        """
        source = from_folder(folder)
        tokenizer = load_tokenizer(source.tokenizer_folder)
        template = template or folder_template(folder, tokenizer, multimodal=source.spec.vision is not None)
        processor = load_processor(source.processor_folder, source.spec) if source.processor_folder else None
        eos = _generation_eos(folder)
        model = load_model(source, build_ops(source.spec), compute_dtype=compute_dtype, device=device).eval()
        return cls(model, tokenizer, processor, template, eos)

    def ask(
        self,
        question: str,
        image: Picture | Sequence[Picture] | None = None,
        settings: GenerationSettings | None = None,
    ) -> str:
        """The answer to a question, about an image or without one.

        Args:
            image: a path or a PIL image; several go with a question whose template has room for them.

        Raises:
            BadRow: an image that cannot be used, or a question that does not fit the template or the model.
        """
        pictures = [image] if isinstance(image, str | Path | Image.Image) else list(image or [])
        settings = settings or GenerationSettings()
        turns = (mark_image(question, bool(pictures)),)
        prompt = self.build_example("ask", turns, [_load(picture) for picture in pictures])
        return self.decode(generate(self.model, [prompt], settings, self.stop)[0])

    def generate(
        self,
        rows: Iterable[PromptRow | Rejected],
        settings: GenerationSettings,
        *,
        batch_size: int,
        images: ImageStore | None = None,
    ) -> Iterator[Answer | Rejected]:
        """The answer to each row, in order; rows that were rejected, or cannot be answered, come out as `Rejected`.

        Args:
            batch_size: rows that are generated together.
            images: where the rows' image paths lead; None if no row has any.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size}; expected at least 1.")
        remaining = iter(rows)
        while batch := list(islice(remaining, batch_size)):
            yield from self._answer(batch, settings, images)

    def build_example(self, id: str, turns: tuple[Turn, ...], pictures: Sequence[Image.Image]) -> Example:
        """A prompt as the model reads it, tokenised as in training.

        Raises:
            BadRow: see `ask`.
        """
        spec = self.model.spec
        if pictures and self.images is None:
            raise BadRow("unexpected_image", "this model has no vision tower: ask without an image.")
        conversation = build_prompt(self.template, turns)
        check_image_count(conversation, len(pictures))
        encoded = encode(
            conversation,
            self.tokenizer,
            visual_tokens=[self._visual_tokens(picture) for picture in pictures],
            # A repetition penalty falls on what stands here, in transformers as well; 0 is unk as a rule.
            pad_id=spec.image_token_id or 0,
            max_length=spec.text.max_positions - 1,  # room for an answer of one token at least
        )
        pixels = merge = None
        if self.images is not None and pictures:
            pixels, merge = self.images.tiles(pictures, encoded.visual_tokens)
        return Example(
            id, encoded.tokens, encoded.supervised, encoded.image_starts, pixels, encoded.visual_tokens, merge
        )

    def _visual_tokens(self, picture: Image.Image) -> int:
        assert self.images is not None
        return self.images.visual_tokens(lambda: (picture.height, picture.width))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without what ended it."""
        body = tokens[:-1] if tokens and tokens[-1] in self.stop.ids else tokens
        text = self.tokenizer.decode(list(body), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        for mark in self.stop.strings:
            text = text.partition(mark)[0]
        return text.strip()

    def _answer(
        self, rows: Sequence[PromptRow | Rejected], settings: GenerationSettings, images: ImageStore | None
    ) -> Iterator[Answer | Rejected]:
        prepared = [self._prepare(row, images) for row in rows]
        prompts = [example for example in prepared if isinstance(example, Example)]
        answers = iter(generate(self.model, prompts, settings, self.stop) if prompts else [])
        for row, example in zip(rows, prepared, strict=True):
            if isinstance(example, Rejected) or isinstance(row, Rejected):
                assert isinstance(example, Rejected)
                yield example
                continue
            tokens = next(answers)
            finish: Finish = "stop" if self.stop.reached(tokens) else "length"
            yield Answer(row.id, row.question, self.decode(tokens), len(tokens), finish, row.reference)

    def _prepare(self, row: PromptRow | Rejected, images: ImageStore | None) -> Example | Rejected:
        if isinstance(row, Rejected):
            return row
        try:
            if row.images and images is None:
                raise BadRow("unexpected_image", "the row has an image, and no image folder was given.")
            pictures = [images.open(name) for name in row.images] if images else []
            return self.build_example(row.id, row.turns, pictures)
        except BadRow as bad:
            return Rejected(row.id, row.index, bad.reason, bad.message)


def build_stop(tokenizer: PreTrainedTokenizerBase, template: Template, ids: Iterable[int] = ()) -> Stop:
    """What ends an answer in a template's text: eos, `ids`, and its end marks.

    A mark that is not a token of its own may also come as part of others, so it is looked for in the text as well.
    """
    marks = [bare_mark(mark) for mark in template.stop]
    strings = tuple(mark for mark in marks if mark not in tokenizer.get_added_vocab())
    return Stop(frozenset(stop_ids(tokenizer, marks)) | frozenset(ids), strings, tokenizer)


def _generation_eos(folder: Path) -> list[int]:
    """The end tokens of the folder's `generation_config.json`.

    Raises:
        WeightsError: a file that cannot be read, or end tokens that are no ids.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read: {error}. Mend it or remove it.") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{file} holds a {type(found).__name__}; expected an object. Mend it or remove it.")
    eos = found.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(token) is not int for token in ids):
        raise WeightsError(f"{file}: eos_token_id = {eos!r}; expected an id or a list of ids.")
    return ids


def _load(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    path = Path(os.path.realpath(picture))
    if not path.parent.is_dir():
        raise BadRow("missing_image", f"there is no image {str(picture)!r}")
    return ImageStore(path.parent, MAX_WORKING_PIXELS).open(path.name)
