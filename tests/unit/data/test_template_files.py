"""Templates of a user's own, the errors of their files, and XTuner's labels for those that are XTuner's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llava_core.data.conversation import Span
from llava_core.data.documents import TEXT
from llava_core.data.piece_template import parse_template, read_template
from llava_core.data.records import Turn
from llava_core.data.templates import BUILTIN_TEMPLATES, FILES, INTERNLM2, V1, open_template
from llava_core.data.tokens import encode
from llava_core.errors import BadRow, ConfigError, PluginError
from llava_core.plugins import Registry
from llava_core.weights.tokenizer import load_tokenizer
from tests.unit.data import original_rules as original
from tests.unit.data.original_rules import XTUNER
from tests.unit.weights.internlm2_folder import save_tokenizer

V1_FILE = (resources.files(FILES) / "v1.yaml").read_text(encoding="utf-8")
OWN = """\
start: ["<<sys>>{}\\n"]
first_human: ["Q1:", "{text}|"]
human: ["Q:", "{text}|"]
assistant: ["A:", {train: "{text}"}, {train: "#"}, "\\n"]
stop: ["#"]
bos: false
strip: true
needs_question: true
"""


def write(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


def chat(*said: str) -> list[Turn]:
    return [Turn("assistant" if number % 2 else "human", text) for number, text in enumerate(said)]


def test_a_file_of_ones_own_is_written_as_it_says(tmp_path: Path) -> None:
    template = open_template(str(write(tmp_path, OWN)), Registry(()))
    assert (template.name, template.stop, template.adds_bos) == ("mine", ("#",), False)
    assert template.render(chat(" a ", " b", "", "", "{text}", "d")).pieces == (
        Span("<<sys>>{}\nQ1:a|A:", False),
        Span("b#", True),
        Span("\nQ:A:", False),
        Span("#", True),
        Span("\nQ:{text}|A:", False),
        Span("d#", True),
        Span("\n", False),
    )
    assert template.prompt(chat("a", "b", "c")).text == "<<sys>>{}\nQ1:a|A:b#\nQ:c|A:"
    with pytest.raises(BadRow, match=r"empty_turn: `mine` needs words"):
        template.render(chat("", "b"))
    with pytest.raises(BadRow, match=r"empty_turn: `mine` needs words"):
        template.render(chat(" \n", "b"))


def test_short_files_have_defaults(tmp_path: Path) -> None:
    template = read_template(write(tmp_path, 'human: ["{text}\\n"]\nassistant: [train: "{text}\\n"]'))
    assert template.render(chat(" a", "b", "c", "d")).text == " a\nb\nc\nd\n"
    assert (template.stop, template.adds_bos, template.start) == ((), True, ())


def test_the_example_of_the_docs_is_a_template() -> None:
    page = (Path(__file__).parents[3] / "docs/data.md").read_text()
    example = page.partition("```yaml\nstart:")[2].partition("```")[0]
    template = parse_template(f"start:{example}", "example", "docs/data.md")
    assert template.render(chat("a", "b")).text == "Answer the questions.\nUSER: a ASSISTANT: b</s>"


# --- images beside LLaVA's own rules for them, of each option of its and NeMo's

IMAGES: dict[str, tuple[str, Callable[[original.Messages], original.Messages]]] = {
    "mm_use_im_start_end": ("image: <im_start><image><im_end>", original.prepare_im_start_end),
    "sep_image_conv_front": (
        'after_image: " USER: "',
        partial(original.prepare_first_llava, sep_image_conv_front=True, use_im_start_end=False),
    ),
    "both, of the first LLaVA": (
        'image: <im_start><image><im_end>\nafter_image: " USER: "',
        partial(original.prepare_first_llava, sep_image_conv_front=True, use_im_start_end=True),
    ),
    "neither, of the first LLaVA": (
        "after_image: null",
        partial(original.prepare_first_llava, sep_image_conv_front=False, use_im_start_end=False),
    ),
    "use_im_start_end, of the first LLaVA": (
        "image: <im_start><image><im_end>\nafter_image: null",
        partial(original.prepare_first_llava, sep_image_conv_front=False, use_im_start_end=True),
    ),
}
SAID = st.lists(st.sampled_from(["a dog", " ", "\n", "USER:", "é"]), max_size=4).map("".join)


@pytest.mark.parametrize("option", IMAGES)
@given(before=SAID, after=SAID, others=st.lists(SAID, max_size=2), answer=SAID.filter(bool))
def test_images_are_where_the_option_has_them(
    option: str, before: str, after: str, others: list[str], answer: str
) -> None:
    assume((before + after).strip())  # of an image alone nothing but white space differs: the next test
    keys, rule = IMAGES[option]
    template = parse_template(f"{V1_FILE}\n{keys}", "mine", "mine.yaml")
    said = [f"{before}<image>{after}", answer]
    for question in others:
        said += [question, answer]
    messages = [("assistant" if number % 2 else "human", text) for number, text in enumerate(said)]
    assert template.render(chat(*said)).text == original.build_text("v1", rule(messages))
    prompt = template.prompt(chat(*said[:-1])).text
    assert prompt == original.build_text("v1", [*rule(messages[:-1]), ("assistant", None)])


def test_an_image_alone_has_nothing_to_be_separated_from() -> None:
    template = parse_template(f'{V1_FILE}\nafter_image: " USER: "', "mine", "mine.yaml")
    assert template.render(chat("<image>", "a")).text.endswith("USER: <image> USER: ASSISTANT: a</s>")


def test_images_that_stay_where_they_are_may_be_several_in_a_message() -> None:
    template = parse_template(f"{V1_FILE}\nafter_image: null", "mine", "mine.yaml")
    rendered = template.render(chat("Is <image> or <image> black? ", "a"))
    assert rendered.num_images == 2
    assert rendered.text.endswith("USER: Is <image> or <image> black?  ASSISTANT: a</s>")


def change(**keys: Any) -> str:
    return yaml.safe_dump({key: value for key, value in (yaml.safe_load(OWN) | keys).items() if value != "gone"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("human: [", "mine.yaml is no YAML: "),
        ("- human", "mine.yaml is list; expected a mapping of start, first_human, human"),
        ("", "mine.yaml is NoneType; expected a mapping"),
        (change(human="gone"), "human: not there; expected a list of pieces."),
        (change(humna=["{text}"]), "humna: no such key. Did you mean 'human'?"),
        (change(system="x"), "system: no such key."),
        (change(human="{text}"), "human = '{text}': expected a list."),
        (change(human=["{input}"]), "human.0 = '{input}': {input} means nothing here; {text} stands for the message."),
        (change(human=["Q"]), "human = ['Q']: expected {text} once, found it 0 times."),
        (change(human=["{text}", "{text}"]), "expected {text} once, found it 2 times."),
        (change(human=["{text}", 5]), 'human.1 = 5: expected a text, or {train: "a text"}.'),
        (change(assistant=[{"learn": "{text}"}]), "assistant.0 = {'learn': '{text}'}: expected a text, or {train: "),
        (change(assistant=["{text}"]), "assistant = ['{text}']: nothing would be learnt: write the piece with {text}"),
        (change(start=["{text}"]), "start = ['{text}']: there is no message yet that {text} could stand for."),
        (change(stop="#"), "stop = '#': expected a list."),
        (change(stop=[""]), "stop.0 = '': String should have at least 1 character."),
        (change(image="<im_start>"), "image = '<im_start>': expected <image> once, found it 0 times."),
        (change(image=" <image>"), "image = ' <image>': expected no white space around it"),
        (change(after_image="<image>"), "after_image = '<image>': expected what follows an image, without <image>."),
        (change(after_image=1), "after_image = 1: Input should be a valid string."),
        (change(bos="no"), "bos = 'no': Input should be a valid boolean."),
    ],
)
def test_a_bad_file_names_itself_the_key_and_what_was_expected(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_template(path)
    assert str(path) in str(raised.value)
    assert said in str(raised.value)


def test_every_problem_is_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read_template(write(tmp_path, change(human="gone", stop="#", x=1)))
    assert len(str(raised.value).splitlines()) == 4


def test_a_file_that_is_not_there_and_a_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the template .*none\.yml cannot be read"):
        open_template(str(tmp_path / "none.yml"), Registry(()))
    with pytest.raises(PluginError, match="unknown template 'intenlm2'.*Did you mean 'internlm2'"):
        open_template("intenlm2", Registry.discover())


def test_each_file_of_the_library_is_registered_under_its_name() -> None:
    registry = Registry.discover()
    stems = {
        file.name.removesuffix(".yaml") for file in resources.files(FILES).iterdir() if file.name.endswith(".yaml")
    }
    assert {"plain", *stems} == set(BUILTIN_TEMPLATES)
    assert all(open_template(name, registry) is template for name, template in BUILTIN_TEMPLATES.items())
    assert open_template("vicuna", registry) is V1


# --- InternLM2 beside XTuner: each input and each output tokenised by itself

WORDS = st.lists(st.sampled_from(["a cat", "what", "日本", "12", "é.", "It is\na dog", "?"]), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[sentencepiece.SentencePieceProcessor, Any]:
    folder = tmp_path_factory.mktemp("internlm2")
    return save_tokenizer(folder), load_tokenizer(folder)


def xtuner_ids(pieces: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Special tokens cut out, sentencepiece between them; -200 for an image."""
    for mark in ("<|im_start|>", "<|im_end|>", "<image>"):
        text = text.replace(mark, f"\0{mark}\0")
    known = {"<|im_start|>": 4, "<|im_end|>": 3, "<image>": -200}
    return [i for part in text.split("\0") for i in ([known[part]] if part in known else pieces.encode(part))]


@given(said=st.lists(WORDS.map(" ".join), min_size=2, max_size=6), image=st.booleans())
@settings(max_examples=100, deadline=None)
def test_internlm2_ids_and_labels_are_xtuners(internlm2: Any, said: list[str], image: bool) -> None:
    pieces, tokenizer = internlm2
    said = said[: len(said) // 2 * 2]
    if image:
        said[0] = f"<image>\n{said[0]}"
    ids, labels, rules = [1], [False], XTUNER["internlm2"]
    for question, answer in zip(said[::2], said[1::2], strict=True):
        asked = xtuner_ids(pieces, rules["instruction"].format(input=question))
        answered = xtuner_ids(pieces, answer + rules["suffix"])
        sep = pieces.encode(rules["sep"])
        ids += asked + answered + sep
        labels += [False] * len(asked) + [True] * len(answered) + [False] * len(sep)
    conversation = INTERNLM2.render(chat(*said))
    visual_tokens = [1] * conversation.num_images
    found = encode(conversation, tokenizer, visual_tokens=visual_tokens, pad_id=-200, max_length=1000)
    assert found.tokens.tolist() == ids
    assert found.supervised.tolist() == labels


def test_a_documents_images_stay_where_they_are_when_it_is_continued_as_when_it_is_learnt() -> None:
    document = "A <image> and <image>"
    assert TEXT.prompt([Turn("human", document)]).text == TEXT.render([Turn("assistant", document)]).text == document
