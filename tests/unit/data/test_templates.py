"""Templates write the original's text, and mark the answers in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llava_core.data.records import Turn
from llava_core.data.templates import (
    BUILTIN_TEMPLATES,
    CHATML,
    LLAMA_2,
    LLAMA_3,
    MISTRAL,
    PLAIN,
    V1,
    Conversation,
    ImageSlot,
    Span,
    check_image_count,
    tokenizer_template,
)
from llava_core.errors import BadRow, ConfigError
from llava_core.testing.tokenizers import train_llama3_tokenizer
from tests.unit.data import original_rules as original

ROUNDS = [name for name in BUILTIN_TEMPLATES if name != "plain"]
WORDS = ["a dog", "USER:", " ASSISTANT: ", "</s>", "<|im_end|>", "[/INST] ", "\n", "  ", "▁", "日本", "é", "<im", "12"]
TEXT = st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=4).map("".join)


@st.composite
def messages(draw: st.DrawFn, last: str) -> original.Messages:
    """Alternating messages that end with `last`: any text, some empty, images anywhere, perhaps an assistant first."""
    count = 2 * draw(st.integers(1, 3)) - (last == "human")
    said = [draw(TEXT) for _ in range(count)]
    for number in range(count):
        if draw(st.integers(0, 3)) == 0:
            said[number] = said[number][:2] + "<image>" + said[number][2:]
    result: original.Messages = [("assistant" if number % 2 else "human", text) for number, text in enumerate(said)]
    return [("assistant", draw(TEXT)), *result] if draw(st.booleans()) else result


def turns(conversation: original.Messages) -> list[Turn]:
    return [Turn("human" if who == "human" else "assistant", said or "") for who, said in conversation]


def chat(*said: str) -> list[Turn]:
    return [Turn("assistant" if number % 2 else "human", text) for number, text in enumerate(said)]


@pytest.mark.parametrize("name", ROUNDS)
@given(conversation=messages("assistant"))
@settings(max_examples=100)
def test_training_text_is_the_originals(name: str, conversation: original.Messages) -> None:
    prepared = original.prepare(conversation)
    assume(prepared[0][1])  # the original's llama_2 asserts that; refused by name below
    assume(any(said for who, said in prepared if who == "assistant"))  # nothing to train, refused by name below
    rendered = BUILTIN_TEMPLATES[name].render(turns(conversation))
    assert rendered.text == original.build_text(name, prepared)
    assert rendered.num_images == rendered.text.count("<image>")


@pytest.mark.parametrize("name", ROUNDS)
@given(conversation=messages("human"))
@settings(max_examples=60)
def test_prompt_is_the_originals(name: str, conversation: original.Messages) -> None:
    prepared = original.prepare(conversation)
    assume(prepared[0][1])
    prompt = BUILTIN_TEMPLATES[name].prompt(turns(conversation))
    assert prompt.text == original.build_text(name, [*prepared, ("assistant", None)])
    assert prompt.is_prompt


@given(caption=TEXT, question=TEXT)
@settings(max_examples=60)
def test_plain_is_the_image_and_its_caption(caption: str, question: str) -> None:
    rendered = PLAIN.render(chat(f"{question}<image>", caption))
    assert rendered == Conversation((ImageSlot(), Span(f"{caption}\n", True)))
    assert PLAIN.prompt(chat(f"<image>{question}")) == Conversation((ImageSlot(),))


def test_v1_by_hand() -> None:
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
    )
    rendered = V1.render(chat(" What<image> ", "A dog.", "Why?", "So."))
    assert rendered.pieces == (
        Span(f"{system}USER: ", False),
        ImageSlot(),
        Span("\nWhat ASSISTANT:", False),
        Span(" A dog.</s>", True),
        Span("USER: Why? ASSISTANT:", False),
        Span(" So.</s>", True),
    )
    assert V1.prompt(chat("Why?")).text == f"{system}USER: Why? ASSISTANT:"


def test_inst_and_chatml_by_hand() -> None:
    rounds = chat("Q", "A", "R", "B")
    assert MISTRAL.render(rounds).text == "[INST] Q [/INST] A </s>[INST] R [/INST] B </s>"
    assert LLAMA_2.render(rounds).text.endswith("<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST] B </s>")
    assert CHATML.render(rounds[:2]).text == (
        "<|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\nQ<|im_end|><|im_start|>assistant\nA<|im_end|>"
    )


def test_llama_3_trains_control_tokens_and_answers_with_their_header() -> None:
    pieces = LLAMA_3.render(chat(" Q ", " A\n")).pieces
    trained = [piece.text for piece in pieces if isinstance(piece, Span) and piece.trainable]
    assert trained == [
        "<|begin_of_text|><|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|><|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    ]


def test_empty_messages_keep_the_originals_text_and_train_nothing() -> None:
    rendered = V1.render(chat("", "A", "Q", "", "R", "B"))
    assert [piece for piece in rendered.pieces[1:] if isinstance(piece, Span)] == [
        Span(" A</s>", True),
        Span("USER: Q ASSISTANT:USER: R ASSISTANT:", False),
        Span(" B</s>", True),
    ]
    assert rendered.text.endswith("questions. USER:ASSISTANT: A</s>USER: Q ASSISTANT:USER: R ASSISTANT: B</s>")


def test_an_image_in_an_answer_leaves_the_rest_of_it_trained() -> None:
    assert V1.render(chat("Q", "see <image>")).pieces[1:] == (
        Span(" ", True),
        ImageSlot(),
        Span("\nsee</s>", True),
    )


@pytest.mark.parametrize(
    ("name", "said", "reason"),
    [
        ("v1", ["Q"], "role_order"),
        ("v1", ["Q", "A", "R"], "role_order"),
        ("v1", ["Q", ""], "no_supervised_token"),
        ("llama_2", ["", "A"], "empty_turn"),
        ("plain", ["<image>", "A", "Q", "B"], "role_order"),
        ("plain", ["Q", "A"], "image_count"),
    ],
)
def test_refused_conversations(name: str, said: list[str], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        BUILTIN_TEMPLATES[name].render(chat(*said))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["assistant", "assistant", "human"], ["human", "human", "assistant"]]
)
def test_only_one_leading_assistant_turn_is_dropped_and_roles_must_alternate(roles: list[Any]) -> None:
    with pytest.raises(BadRow, match="role_order"):
        V1.render([Turn(role, "text") for role in roles])


def test_prompt_must_end_with_a_question() -> None:
    with pytest.raises(BadRow, match="role_order"):
        V1.prompt(chat("Q", "A"))


@pytest.mark.parametrize(
    ("said", "images", "fits"), [("<image>a", 1, True), ("a", 1, False), ("<image><image>", 2, False)]
)
def test_image_slots_must_equal_images(said: str, images: int, fits: bool) -> None:
    conversation = V1.render(chat(said, "A"))
    if fits:
        check_image_count(conversation, images)
    else:
        with pytest.raises(BadRow, match="image_count"):
            check_image_count(conversation, images)


# --- a tokenizer's own chat template


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_llama3_tokenizer(tmp_path_factory.mktemp("llama3"), ["a dog and a cat"] * 4, 300)


def with_chat_template(tokenizer: Any, chat_template: str) -> Any:
    tokenizer.chat_template = chat_template
    return tokenizer


CHATML_JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("chat_template", [CHATML_JINJA, MARKED_JINJA])
@given(said=st.lists(TEXT.map(str.strip), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_answers_are_found_in_a_chat_template(tokenizer: Any, chat_template: str, said: list[str]) -> None:
    template = tokenizer_template(with_chat_template(tokenizer, chat_template))
    rendered = template.render(chat(*said))
    question = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.pieces == (
        Span(question.format(said[0]), False),
        Span(f"{said[1]}<|im_end|>", True),
        Span("\n" + question.format(said[2]), False),
        Span(f"{said[3]}<|im_end|>", True),
        Span("\n", False),
    )
    assert template.stop == ("<|im_end|>",)
    assert template.prompt(chat(said[0])).text == question.format(said[0])


def test_images_keep_their_place_in_a_chat_template(tokenizer: Any) -> None:
    template = tokenizer_template(with_chat_template(tokenizer, CHATML_JINJA))
    rendered = template.render(chat("look <image>", "A"))
    assert rendered.pieces[:2] == (Span("<|im_start|>user\n", False), ImageSlot())
    assert not rendered.adds_bos


LAST_ANSWER_ONLY = (
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"
)


def test_an_answer_that_cannot_be_found_is_an_error(tokenizer: Any) -> None:
    template = tokenizer_template(with_chat_template(tokenizer, LAST_ANSWER_ONLY))
    assert template.render(chat("Q", "A")).text == "[Q][A]"
    with pytest.raises(ConfigError, match="cannot find answer 1 of 2"):
        template.render(chat("Q", "A", "R", "B"))


@pytest.mark.parametrize("chat_template", [None, "{% for m in messages %}{{ m.role }}{% endfor %}"])
def test_a_chat_template_that_cannot_serve_is_an_error(tokenizer: Any, chat_template: Any) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        tokenizer_template(with_chat_template(tokenizer, chat_template))


def test_llama_3_text_is_its_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = train_llama3_tokenizer(tmp_path, ["a dog and a cat"] * 4, 300)
    own = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": original.SYSTEMS["llama_3"]},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A"},
        ],
        tokenize=False,
    )
    assert LLAMA_3.render(chat("Q", "A")).text == own
