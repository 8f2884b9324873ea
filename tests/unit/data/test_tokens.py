"""Ids and labels are the original's: sentencepiece under the slow tokenizer's rules, labels by counting rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from llava_core.data.records import Turn
from llava_core.data.templates import (
    BUILTIN_TEMPLATES,
    CHATML,
    LLAMA_3,
    PLAIN,
    V1,
    Conversation,
    ImageSlot,
    Span,
    tokenizer_template,
)
from llava_core.data.tokens import Encoded, describe, encode, render_supervised, save_tokenizer
from llava_core.errors import BadRow, ConfigError
from llava_core.testing.tokenizers import train_llama3_tokenizer, train_llama_tokenizer
from tests.unit.data import original_rules as original

# The count of rounds is right only for vocabularies like Llama's, in which "USER" is one piece and "▁USER" two, and "["
# and "▁[" one each. Hence words that follow no space where Llama's pieces have none, and brackets that do.
CORPUS = [
    "the (USER: said _USER: to xUSER: that <USER: is there",
    "what is in the image? a dog and a cat on a mat, and a bird in the sky (ASSISTANT) 2 dogs",
    "a [b] and [c] in [d] or [e] of [f] xINST] (INST/ yINST- /INST] zINST",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful answers.",
]
VISUAL_TOKENS = 3
WORDS = ["a dog", "USER", "USER:", " ASSISTANT", "INST", "[", "]", " [", "\n", " ", "  ", "▁", "日本", "é", "<im", "12"]
TEXT = st.lists(st.sampled_from(WORDS) | st.text(max_size=6), min_size=1, max_size=5).map("".join)
SPECIAL = st.sampled_from(["</s>", "<s>", "<unk>", "</s> a", "USER: q ASSISTANT: a</s>", "[/INST] "])


@st.composite
def conversations(draw: st.DrawFn, text: st.SearchStrategy[str]) -> original.Messages:
    """One to four rounds, some with an image anywhere in the question, perhaps an assistant turn before them."""
    result: original.Messages = []
    for _ in range(draw(st.integers(1, 4))):
        question = draw(text)
        if draw(st.booleans()):
            place = draw(st.integers(0, len(question)))
            question = f"{question[:place]}<image>{question[place:]}"
        result += [("human", question), ("assistant", draw(text))]
    return [("assistant", draw(text)), *result] if draw(st.booleans()) else result


def turns(messages: original.Messages) -> list[Turn]:
    return [Turn("human" if who == "human" else "assistant", said or "") for who, said in messages]


def chat(*said: str) -> list[Turn]:
    return [Turn("assistant" if number % 2 else "human", text) for number, text in enumerate(said)]


class Tokenizers:
    """The tokenizers under test, each with the reference that must agree with it."""

    def __init__(self, folder: Path) -> None:
        chatml = ["<|im_start|>", "<|im_end|>"]
        self.ours: dict[str, Any] = {}
        self.reference: dict[str, original.Tokenize] = {}
        for name, legacy in (("legacy", True), ("modern", False)):
            ours = train_llama_tokenizer(folder / name, CORPUS * 8, 440, legacy=legacy)
            ours.add_special_tokens({"additional_special_tokens": chatml})
            specials = {token: ours.get_vocab()[token] for token in chatml}
            self.ours[name] = ours
            self.reference[name] = original.SlowLlama(folder / name / "tokenizer.model", legacy, specials)
        byte_level = train_llama3_tokenizer(folder / "byte_level", CORPUS * 8, 400)
        byte_level.add_special_tokens({"additional_special_tokens": chatml})
        self.ours["byte_level"] = byte_level
        self.reference["byte_level"] = original.ByteLevel(byte_level)

    def encode(self, name: str, conversation: Conversation, max_length: int = 10_000) -> Encoded:
        visual_tokens = [VISUAL_TOKENS] * conversation.num_images
        return encode(conversation, self.ours[name], visual_tokens=visual_tokens, pad_id=0, max_length=max_length)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    return Tokenizers(tmp_path_factory.mktemp("tokenizers"))


def assert_equal(encoded: Encoded, expected: tuple[list[int], list[bool]]) -> None:
    assert encoded.tokens.tolist() == expected[0]
    assert encoded.supervised.tolist() == expected[1]


def test_the_vocabulary_has_the_property_the_original_counts_on(tokenizers: Tokenizers) -> None:
    for name in ("legacy", "modern"):
        vocabulary = set(tokenizers.ours[name].get_vocab())
        assert {"USER", "▁["} <= vocabulary
        assert "▁USER" not in vocabulary


# --- equality with the original


# chatml: the count of rounds is wrong under `legacy` (an excess token from the second round on); spans decide there.
COUNTED = [
    ("v1", "legacy"),
    ("v1", "modern"),
    ("llama_2", "legacy"),
    ("llama_2", "modern"),
    ("mistral", "legacy"),
    ("mistral", "modern"),
    ("chatml", "modern"),
    ("chatml", "byte_level"),
    ("llama_3", "byte_level"),
]


@pytest.mark.parametrize(("template", "name"), COUNTED)
@given(messages=conversations(TEXT))
@settings(max_examples=200)
def test_ids_and_labels_are_the_originals(
    tokenizers: Tokenizers, template: str, name: str, messages: original.Messages
) -> None:
    prepared = original.prepare(messages)
    # Empty messages, and text that the original itself splits rounds by: its count fails; the spans are tested by hand.
    assume(all(said for _, said in prepared))
    assume(not any(mark in (said or "") for _, said in prepared for mark in original.UNCOUNTABLE[template]))
    ids, trained = original.train_on(template, prepared, tokenizers.reference[name])
    assert any(trained), "the reference gave up on a conversation that it should manage"
    encoded = tokenizers.encode(name, BUILTIN_TEMPLATES[template].render(turns(messages)))
    assert_equal(encoded, original.expand(ids, trained, VISUAL_TOKENS, 0))
    assert encoded.image_starts == tuple(
        position + (VISUAL_TOKENS - 1) * before
        for before, position in enumerate(number for number, token in enumerate(ids) if token == original.IMAGE)
    )


@pytest.mark.parametrize("name", ["legacy", "modern", "byte_level"])
@given(caption=TEXT | st.just(""))
@settings(max_examples=150)
def test_plain_ids_and_labels_are_the_originals(tokenizers: Tokenizers, name: str, caption: str) -> None:
    messages: original.Messages = [("human", "<image>"), ("assistant", caption)]
    ids, trained = original.train_on("plain", messages, tokenizers.reference[name])
    encoded = tokenizers.encode(name, PLAIN.render(turns(messages)))
    assert_equal(encoded, original.expand(ids, trained, VISUAL_TOKENS, 0))


@pytest.mark.parametrize(("template", "name"), [("v1", "modern"), ("llama_2", "modern"), ("v1", "byte_level")])
@given(messages=conversations(TEXT | SPECIAL | st.just("")))
@settings(max_examples=100)
def test_ids_are_the_originals_whatever_is_written(
    tokenizers: Tokenizers, template: str, name: str, messages: original.Messages
) -> None:
    prepared = original.prepare(messages)
    assume(prepared[0][1] and any(said for who, said in prepared if who == "assistant"))
    encoded = tokenizers.encode(name, BUILTIN_TEMPLATES[template].render(turns(messages)))
    ids = original.ids_with_images(original.build_text(template, prepared), tokenizers.reference[name])
    assert encoded.tokens.tolist() == original.expand(ids, [False] * len(ids), VISUAL_TOKENS, 0)[0]


@pytest.mark.parametrize(("template", "name"), COUNTED)
@given(messages=conversations(TEXT))
@settings(max_examples=60)
def test_training_starts_with_the_prompts_ids(
    tokenizers: Tokenizers, template: str, name: str, messages: original.Messages
) -> None:
    prepared = original.prepare(messages)
    assume(prepared[0][1] and prepared[-1][1])
    # A line break at an answer's start may join the one that ends a header.
    assume(template != "chatml" or not (prepared[-1][1] or "")[0].isspace())
    everything = turns(messages)
    prompt = tokenizers.encode(name, BUILTIN_TEMPLATES[template].prompt(everything[:-1]))
    training = tokenizers.encode(name, BUILTIN_TEMPLATES[template].render(everything))
    assert training.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()
    assert not prompt.supervised.any()
    assert bool(training.supervised[len(prompt.tokens) :].all())


def test_plain_training_starts_with_the_prompts_ids(tokenizers: Tokenizers) -> None:
    prompt = tokenizers.encode("modern", PLAIN.prompt(chat("<image>what")))
    training = tokenizers.encode("modern", PLAIN.render(chat("<image>what", "a dog")))
    assert prompt.tokens.tolist() == [1, *[0] * VISUAL_TOKENS] == training.tokens[: 1 + VISUAL_TOKENS].tolist()


# --- where the spans decide


def supervised_text(tokenizer: Any, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.tokens[encoded.supervised], clean_up_tokenization_spaces=False)


def test_special_text_of_a_user_is_a_special_token_and_not_trained(tokenizers: Tokenizers) -> None:
    encoded = tokenizers.encode("modern", V1.render(chat("what is </s> here", "a dog", "why", "so")))
    assert (encoded.tokens == 2).sum() == 3
    assert supervised_text(tokenizers.ours["modern"], encoded) == "a dog</s> so</s>"


def test_separators_inside_a_message_do_not_move_the_labels(tokenizers: Tokenizers) -> None:
    rendered = V1.render(chat("say ASSISTANT: a", "a ASSISTANT: b</s>c"))
    encoded = tokenizers.encode("legacy", rendered)
    assert supervised_text(tokenizers.ours["legacy"], encoded) == "a ASSISTANT: b</s> c</s>"


def test_empty_messages_train_the_other_answers(tokenizers: Tokenizers) -> None:
    encoded = tokenizers.encode("modern", V1.render(chat("", "a dog", "why", "", "what", "a cat")))
    assert supervised_text(tokenizers.ours["modern"], encoded) == "a dog</s> a cat</s>"


def test_an_image_in_an_answer_is_no_target(tokenizers: Tokenizers) -> None:
    encoded = tokenizers.encode("modern", V1.render(chat("what", "<image> a dog")))
    start = encoded.image_starts[0]
    assert not encoded.supervised[start : start + VISUAL_TOKENS].any()
    # The space before the image, then the line break after it and its own ▁.
    assert encoded.supervised[start - 1]
    assert encoded.supervised[start + VISUAL_TOKENS :].all()


def test_chatml_under_legacy_trains_each_answer_and_its_end(tokenizers: Tokenizers) -> None:
    encoded = tokenizers.encode("legacy", CHATML.render(chat("what", "a dog", "why", "so")))
    pieces = tokenizers.ours["legacy"].convert_ids_to_tokens(encoded.tokens[encoded.supervised].tolist())
    assert "".join(pieces) == "a▁dog<|im_end|>so<|im_end|>"


# --- truncation


def image_second(tokenizers: Tokenizers) -> tuple[Conversation, Encoded]:
    conversation = V1.render(chat("what", "a dog", "<image> and", "a cat"))
    return conversation, tokenizers.encode("modern", conversation)


def test_a_long_sample_is_cut(tokenizers: Tokenizers) -> None:
    conversation, whole = image_second(tokenizers)
    for max_length in range(len(whole.tokens) - 3, len(whole.tokens) + 1):
        cut = tokenizers.encode("modern", conversation, max_length)
        assert cut.tokens.tolist() == whole.tokens[:max_length].tolist()
        assert cut.supervised.tolist() == whole.supervised[:max_length].tolist()
        assert cut.image_starts == whole.image_starts


@pytest.mark.parametrize("kept", range(VISUAL_TOKENS + 1))
def test_a_cut_image_is_left_out_whole(tokenizers: Tokenizers, kept: int) -> None:
    conversation, whole = image_second(tokenizers)
    start = whole.image_starts[0]
    cut = tokenizers.encode("modern", conversation, start + kept)
    complete = kept == VISUAL_TOKENS
    assert len(cut.tokens) == start + (VISUAL_TOKENS if complete else 0)
    assert cut.image_starts == (whole.image_starts if complete else ())
    # The targets that are left, with all that precedes them, are those of the sample cut through the image.
    assert cut.supervised.sum() == whole.supervised[: start + kept].sum()


def test_a_sample_without_targets_is_refused(tokenizers: Tokenizers) -> None:
    conversation, whole = image_second(tokenizers)
    first = int(whole.supervised.nonzero()[0])
    assert tokenizers.encode("modern", conversation, first + 1).supervised.sum() == 1
    with pytest.raises(BadRow, match="no_supervised_token"):
        tokenizers.encode("modern", conversation, first)


def test_a_target_without_predecessor_does_not_count(tokenizers: Tokenizers) -> None:
    with pytest.raises(BadRow, match="no_supervised_token"):
        tokenizers.encode("byte_level", LLAMA_3.render(chat("what", "a dog")), 1)


def test_a_prompt_is_never_cut(tokenizers: Tokenizers) -> None:
    prompt = V1.prompt(chat("what"))
    length = len(tokenizers.encode("modern", prompt).tokens)
    assert len(tokenizers.encode("modern", prompt, length).tokens) == length
    with pytest.raises(BadRow, match="prompt_too_long"):
        tokenizers.encode("modern", prompt, length - 1)


# --- tokenizers


def test_images_need_visual_tokens(tokenizers: Tokenizers) -> None:
    for lengths in ((), (0,), (2, 2)):
        with pytest.raises(ValueError, match="1 images needs visual_tokens"):
            encode(
                Conversation((ImageSlot(),)), tokenizers.ours["modern"], visual_tokens=lengths, pad_id=0, max_length=9
            )


def test_dtypes_and_pad_id(tokenizers: Tokenizers) -> None:
    encoded = encode(
        Conversation((ImageSlot(), Span("a dog", True))),
        tokenizers.ours["modern"],
        visual_tokens=[2],
        pad_id=7,
        max_length=99,
    )
    assert encoded.tokens.dtype == torch.int64
    assert encoded.supervised.dtype == torch.bool
    assert encoded.tokens[:3].tolist() == [1, 7, 7]
    assert encoded.image_starts == (1,)


def test_tokens_with_trimmed_offsets_belong_where_their_space_is(tmp_path: Path) -> None:
    tokenizer = train_llama3_tokenizer(tmp_path, CORPUS * 8, 400)
    conversation = Conversation((Span("a", False), Span(" dog", True), Span("  ", False), Span(" cat", True)))
    expected = encode(conversation, tokenizer, visual_tokens=(), pad_id=0, max_length=99)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    with_bos = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(add_prefix_space=False, trim_offsets=True), with_bos]
    )
    assert tokenizer(" dog", return_offsets_mapping=True).offset_mapping[1] == (1, 4)
    encoded = encode(conversation, tokenizer, visual_tokens=(), pad_id=0, max_length=99)
    assert_equal(encoded, (expected.tokens.tolist(), expected.supervised.tolist()))


def test_a_chat_templates_ids_are_the_tokenizers_own(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers.ours["byte_level"]
    messages = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a dog"}]
    encoded = tokenizers.encode("byte_level", tokenizer_template(tokenizer).render(chat("what is it", "a dog")))
    assert encoded.tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert supervised_text(tokenizer, encoded) == "a dog<|eot_id|>"


def test_a_tokenizer_that_adds_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = train_llama_tokenizer(tmp_path, CORPUS * 8, 440, legacy=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True, add_eos_token=True)
    with pytest.raises(ConfigError, match="add_eos_token"):
        encode(Conversation((Span("a", True),)), tokenizer, visual_tokens=(), pad_id=0, max_length=9)


def test_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    train_llama_tokenizer(tmp_path, CORPUS * 8, 440, legacy=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=False)
    encoded = encode(Conversation((Span("a dog", True),)), tokenizer, visual_tokens=(), pad_id=0, max_length=9)
    assert encoded.tokens.tolist() == tokenizer("a dog").input_ids
    assert 1 not in encoded.tokens
    assert "bos <s> = 1 (not added to a text)" in describe(tokenizer)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "legacy",
            "LlamaTokenizer: 442 tokens, legacy=True (▁ after every special token), bos <s> = 1 (added to a text)",
        ),
        (
            "modern",
            "LlamaTokenizer: 442 tokens, legacy=False (▁ only where a text starts), bos <s> = 1 (added to a text)",
        ),
    ],
)
def test_describe(tokenizers: Tokenizers, name: str, expected: str) -> None:
    assert describe(tokenizers.ours[name]) == f"{expected}, eos </s> = 2, pad <unk> = 0"


def test_describe_byte_level(tokenizers: Tokenizers) -> None:
    assert "no ▁ before a text, bos <|begin_of_text|> = " in describe(tokenizers.ours["byte_level"])


@pytest.mark.parametrize("name", ["legacy", "modern", "byte_level"])
def test_a_saved_tokenizer_tokenises_alike(tokenizers: Tokenizers, tmp_path: Path, name: str) -> None:
    text = "a</s>USER: <|im_end|>b\n日本"
    tokenizer = tokenizers.ours[name]
    for folder in (tmp_path / "once", tmp_path / "twice"):
        save_tokenizer(tokenizer, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text).input_ids == tokenizers.ours[name](text).input_ids
        assert describe(tokenizer) == describe(tokenizers.ours[name])


def test_the_same_corpus_gives_the_same_tokenizer(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        train_llama_tokenizer(tmp_path / folder / "llama", CORPUS, 400, legacy=True)
        train_llama3_tokenizer(tmp_path / folder / "llama3", CORPUS, 400)
    for file in ("llama/tokenizer.model", "llama/tokenizer.json", "llama3/tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", ["modern", "byte_level"])
def test_render_supervised_shows_the_whole_sample(tokenizers: Tokenizers, name: str) -> None:
    encoded = tokenizers.encode(name, V1.render(chat("<image>what", "a 日本 dog", "why", "so")))
    shown = render_supervised(
        tokenizers.ours[name], encoded.tokens, encoded.supervised, encoded.image_starts, encoded.visual_tokens
    )
    assert shown.plain.endswith(
        "user's questions. USER: [image ×3]\nwhat ASSISTANT:⟦ a 日本 dog</s>⟧USER: why ASSISTANT:⟦ so</s>⟧"
    )
    assert [shown.plain[span.start : span.end] for span in shown.spans if "green" in str(span.style)] == [
        "⟦ a 日本 dog</s>⟧",
        "⟦ so</s>⟧",
    ]
