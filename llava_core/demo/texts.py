"""What the demo says about digits: captions, questions with their answers, and text to learn the language from."""

from __future__ import annotations

import random

from llava_core.data.records import Turn
from llava_core.data.templates import PLAIN, V1, Conversation, Span

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

WHAT = "What digit is this?"
PARITY = "Is this digit even or odd?"
NEXT = "Which number comes next?"
QUESTIONS = (WHAT, PARITY, NEXT)

MAX_MENTIONS = 16


def caption(digit: int) -> str:
    """What stage 1 learns to say of a picture."""
    return f"a handwritten {WORDS[digit]}"


def answer(question: str, digit: int) -> str:
    """What stage 2 learns to answer."""
    word = WORDS[digit]
    answers = {
        WHAT: f"The digit is {word}.",
        PARITY: f"The digit {word} is {'odd' if digit % 2 else 'even'}.",
        NEXT: f"After {word} comes {WORDS[digit + 1]}.",
    }
    return answers[question]


def tokenizer_corpus() -> list[str]:
    """What the demo reads and says, the digits' names often enough that each becomes one token."""
    talk = [f"{question} {answer(question, digit)}" for question in QUESTIONS for digit in range(10)]
    captions = [caption(digit) for digit in range(10)]
    prompts = [V1.prompt([Turn("human", question)]).text for question in QUESTIONS]
    return talk + captions + 10 * prompts + 100 * [" ".join(WORDS)]


def caption_text(rng: random.Random) -> Conversation:
    """Text that names a digit and then captions it: the caption template, with words in a picture's place.

    Whoever reads much of this, and of `chat_text`, looks back for the digit when it is asked for. That is all a picture
    has to tie in with later: the projector learns to make visual tokens that read like the digit's name.
    """
    digit, named = _mention(rng)
    rendered = PLAIN.render([Turn("human", "<image>"), Turn("assistant", caption(digit))])
    return Conversation((Span(f"{named} ", True), *rendered.pieces[1:]), rendered.adds_bos)


def chat_text(rng: random.Random) -> Conversation:
    """A question about a digit that the user names, as the chat template writes it, and its answer."""
    digit, named = _mention(rng)
    question = rng.choice(QUESTIONS)
    return V1.render([Turn("human", f"{named}\n{question}"), Turn("assistant", answer(question, digit))])


def _mention(rng: random.Random) -> tuple[int, str]:
    """A digit, and its name as often as a picture has visual tokens, or less often."""
    digit = rng.randrange(10)
    return digit, " ".join([WORDS[digit]] * rng.randint(1, MAX_MENTIONS))
