"""Makes the demo model's training text: questions about Tandem, facts to recall across filler, and plain pages.

Everything is drawn from a seeded `random.Random`, so one seed is one text. The recalled values are drawn fresh for
each sample: they cannot be memorised, only copied out of the prompt.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from demo_topics import OFF_TOPIC, PAGES, TOPICS
from demo_words import (
    ADJECTIVES,
    ATTRIBUTES,
    NAMES,
    NOTED,
    NOUN_FRAMES,
    NOUNS,
    OFF_FRAMES,
    OWN,
    PLACES,
    POLITE,
    STATE_PREFIXES,
    SYSTEMS,
    TITLES,
    VERBS,
)

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


class Piece(NamedTuple):
    """A run of text; the loss counts only pieces with `learn` set."""

    text: str
    learn: bool


class Fact(NamedTuple):
    """A statement, ways to ask for it, and the one right answer (without its full stop)."""

    statement: str
    asks: tuple[str, ...]
    answer: str


class Mix(NamedTuple):
    """How a phase draws its samples; `filler` is the largest number of filler words around the facts."""

    recall: float
    repeat: float
    question: float
    page: float
    filler: int


class Chat(NamedTuple):
    """A conversation: an optional system message ("" for none) and (user, assistant) turns."""

    system: str
    turns: list[tuple[str, str]]


def pseudo_word(rng: random.Random) -> str:
    """A word that no list holds, so that copying cannot lean on known spellings."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


def digits(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(low, high)))


def value(rng: random.Random) -> str:
    """A fresh secret: mostly digits, else words, made-up words or letters with digits."""
    draw = rng.random()
    if draw < 0.45:
        return digits(rng, 4, 4)
    if draw < 0.6:
        return digits(rng, 2, 8)
    if draw < 0.8:
        return rng.choice(NOUNS)
    if draw < 0.85:
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if draw < 0.9:
        return rng.choice(NAMES + PLACES)
    if draw < 0.95:
        return pseudo_word(rng)
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(2, 3))) + digits(rng, 2, 4)


def _asks(key: str) -> tuple[str, ...]:
    return (
        f"What is {key}?",
        f"What is {key}?",
        f"What was {key}?",
        f"Tell me {key}.",
        f"what is {key}",
        f"What's {key}?",
        f"Do you remember {key}?",
        f"Please tell me {key}.",
        f"Now, what is {key}?",
        f"Can you tell me {key}?",
        f"Question: what is {key}?",
        f"Repeat {key}.",
        f"what is {key}?",
    )


def fact(rng: random.Random, attribute: str) -> Fact:
    """One fact in one of four shapes; the answer repeats the statement, except that "my" becomes "your"."""
    secret = value(rng)
    owner = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" if rng.random() < 0.7 else rng.choice(NOUNS)
    shape = rng.random()
    if shape < 0.6:
        key = f"the {attribute} {rng.choice(('of', 'of', 'for'))} the {owner}"
    elif shape < 0.7:
        key = f"the {attribute}"
    elif shape < 0.85:
        key = f"{rng.choice(NAMES)}'s {attribute}"
    else:
        own = rng.choice(OWN)
        return Fact(f"my {own} is {secret}", _asks(f"my {own}"), f"Your {own} is {secret}")
    return Fact(f"{key} is {secret}", _asks(key), f"{_capital(key)} is {secret}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts with different keys; often they share an attribute, so that only the owner tells them apart."""
    found: dict[str, Fact] = {}
    shared = rng.choice(ATTRIBUTES)
    while len(found) < count:
        one = fact(rng, shared if rng.random() < 0.4 else rng.choice(ATTRIBUTES))
        found.setdefault(one.answer.partition(" is ")[0].lower(), one)
    return list(found.values())


def state(rng: random.Random, one: Fact) -> str:
    text = rng.choice(STATE_PREFIXES) + one.statement + "."
    return text if rng.random() < 0.1 else _capital(text)


def filler_sentence(rng: random.Random) -> str:
    """One sentence that means nothing: the facts must be found among many of these."""
    noun, other = rng.choice(NOUNS), rng.choice(NOUNS)
    adjective, verb = rng.choice(ADJECTIVES), rng.choice(VERBS)
    draw = rng.random()
    if draw < 0.3:
        return f"The {adjective} {noun} {verb} the {rng.choice(ADJECTIVES)} {other}."
    if draw < 0.45:
        return f"{rng.choice(NAMES)} {verb} a {noun} in {rng.choice(PLACES)} and {rng.choice(VERBS)} the {other}."
    if draw < 0.55:
        return f"Line {rng.randint(1, 300)}: there were {rng.randint(2, 99)} {noun}s near the {adjective} {other}."
    if draw < 0.65:
        return f"In {rng.randint(1200, 2030)} the {noun} of {rng.choice(PLACES)} was {adjective}."
    if draw < 0.75:
        return rng.choice(rng.choice(PAGES + tuple(t.answer for t in TOPICS)).split(". ")).rstrip(".") + "."
    if draw < 0.85:
        return " ".join(rng.choice(NOUNS + VERBS + ADJECTIVES) for _ in range(rng.randint(4, 12))) + "."
    if draw < 0.92:
        return _capital(" ".join(pseudo_word(rng) for _ in range(rng.randint(3, 8)))) + "."
    return f"When it was {adjective}, the {noun} and the {other} went to {rng.choice(PLACES)} by {rng.choice(NOUNS)}."


def filler(rng: random.Random, words: int) -> list[str]:
    """Sentences of about `words` words; sometimes one sentence again and again, as load generators do."""
    sentences: list[str] = []
    again = rng.random() < 0.15
    while words > 0:
        sentence = sentences[-1] if again and sentences and rng.random() < 0.9 else filler_sentence(rng)
        sentences.append(sentence)
        words -= len(sentence.split())
    return sentences


def _prompt(rng: random.Random, stated: list[Fact], words: int) -> str:
    """Facts in random places between filler sentences."""
    sentences = filler(rng, words)
    for one in stated:
        sentences.insert(rng.randint(0, len(sentences)), state(rng, one))
    return rng.choice((" ", " ", " ", "\n")).join(sentences)


def recall_chat(rng: random.Random, max_filler: int) -> Chat:
    """Facts and filler once, then many questions: each turn is one more lesson from the same context."""
    stated = facts(rng, rng.choice((1, 2, 2, 3, 3, 4, 4, 5)))
    text = _prompt(rng, stated, rng.randint(0, max_filler) if rng.random() < 0.9 else 0)
    questions = [*rng.sample(stated, len(stated)), rng.choice(stated)]
    turns: list[tuple[str, str]] = []
    system = rng.choice(SYSTEMS) if rng.random() < 0.2 else ""
    draw = rng.random()
    if draw < 0.1:
        system = text
    elif draw < 0.4:
        turns.append((text, NOTED))
    else:
        gap = rng.choice((" ", "\n", "\n\n"))
        turns.append((text + gap + rng.choice(questions[0].asks), questions.pop(0).answer + "."))
    for one in questions:
        if rng.random() < 0.1:
            turns.append(question(rng))
        turns.append((rng.choice(one.asks), one.answer + "."))
    return Chat(system, turns)


def recall_prompt(rng: random.Random, words: int, count: int) -> tuple[str, str]:
    """A single message that states `count` facts and asks for one, with its answer: the evaluation's shape."""
    stated = facts(rng, count)
    asked = rng.choice(stated)
    return _prompt(rng, stated, words) + " " + asked.asks[0], asked.answer + "."


def repeat_turn(rng: random.Random) -> tuple[str, str]:
    """Copying word for word: the densest lesson for the attention heads that recall needs."""
    kind = rng.random()
    if kind < 0.4:
        text = " ".join(rng.choice(NOUNS + ADJECTIVES + VERBS) for _ in range(rng.randint(2, 24)))
    elif kind < 0.6:
        text = digits(rng, 3, 24)
    elif kind < 0.8:
        text = " ".join(value(rng) for _ in range(rng.randint(2, 10)))
    else:
        text = filler_sentence(rng)
    return rng.choice(("Repeat: ", "Repeat after me: ", "Say: ", "repeat: ", "Please repeat: ", "Echo: ")) + text, text


def vary(rng: random.Random, text: str) -> str:
    """The spellings people use: capitals or none, with or without a question mark, polite or short."""
    if rng.random() < 0.75:
        text = " ".join(TITLES.get(word, word) for word in text.split(" "))
    text = rng.choice(POLITE) + text if rng.random() < 0.12 else text
    text = _capital(text) if rng.random() < 0.65 else text
    text = text.upper() if rng.random() < 0.02 else text
    return text + rng.choice(("?", "?", "?", "?", "?", "", "", "", ".", "!"))


def _noun(rng: random.Random, noun: str) -> str:
    bare = noun.split(" ", 1)[0] not in ("a", "the", "this", "your", "role", "life")
    return (rng.choice(("", "a ", "the ")) if bare else "") + noun + (" in tandem" if rng.random() < 0.1 else "")


def topic_questions(rng: random.Random, index: int) -> str:
    """One way to ask for topic `index`."""
    topic = TOPICS[index]
    if topic.nouns and (not topic.asks or rng.random() < 0.5):
        return vary(rng, rng.choice(NOUN_FRAMES).format(_noun(rng, rng.choice(topic.nouns))))
    return vary(rng, rng.choice(topic.asks))


def off_topic_question(rng: random.Random) -> str:
    draw = rng.random()
    things = NOUNS if draw < 0.6 else PLACES + NAMES

    def pick() -> str:
        return rng.choice((rng.choice(things), rng.choice(things), pseudo_word(rng), digits(rng, 1, 2)))

    if draw < 0.3:
        frame = rng.choice(NOUN_FRAMES)
        return vary(
            rng, frame.format(rng.choice(("", "a ", "the ")) + rng.choice((rng.choice(things), pseudo_word(rng))))
        )
    return vary(rng, rng.choice(OFF_FRAMES).format(pick(), rng.choice(ADJECTIVES + NOUNS)))


def question(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.15:
        return off_topic_question(rng), OFF_TOPIC
    index = rng.randrange(len(TOPICS))
    return topic_questions(rng, index), TOPICS[index].answer


def question_chat(rng: random.Random) -> Chat:
    system = rng.choice(SYSTEMS) if rng.random() < 0.3 else ""
    return Chat(system, [question(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))])


def page(rng: random.Random) -> list[Piece]:
    """A plain page from one of its sentences on, so that a raw prompt may begin anywhere."""
    sentences = rng.choice(PAGES).split(". ")
    start = 0 if rng.random() < 0.6 else rng.randrange(len(sentences))
    return [Piece(". ".join(sentences[start:]) + END_OF_TEXT, True)]


def chat_pieces(chat: Chat) -> list[Piece]:
    """ChatML, exactly as the chat template renders it; only the assistant's words are learned."""
    pieces = [Piece(f"{IM_START}system\n{chat.system}{IM_END}\n", False)] if chat.system else []
    for user, assistant in chat.turns:
        pieces.append(Piece(f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n", False))
        pieces += [Piece(assistant + IM_END, True), Piece("\n", False)]
    return pieces


def samples(rng: random.Random, mix: Mix) -> Iterator[list[Piece]]:
    """An endless stream of samples in the proportions of `mix`."""
    kinds = ("recall", "repeat", "question", "page")
    while True:
        kind = rng.choices(kinds, (mix.recall, mix.repeat, mix.question, mix.page))[0]
        if kind == "page":
            yield page(rng)
        elif kind == "recall":
            yield chat_pieces(recall_chat(rng, mix.filler))
        elif kind == "repeat":
            yield chat_pieces(Chat("", [repeat_turn(rng) for _ in range(rng.randint(1, 3))]))
        else:
            yield chat_pieces(question_chat(rng))
