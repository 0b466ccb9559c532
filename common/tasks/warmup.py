"""A few kinds of tiny generated questions that a very small model half knows, for a first run without any download.

First letter of a word, the next number, the larger of two numbers, small sums: each asked in a chat after a worked
example of its own kind, so that even a 135M model writes the tags and about half of the answers, and nearly every
group of completions holds right ones and wrong ones. Answers are a few tokens.

Three in ten of all questions are held out, the same ones for every seed and size: no training prompt asks or shows one,
and what differs only in the order of its numbers (3 + 5, 5 + 3) is on one side together.
"""

from __future__ import annotations

import difflib
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from common.errors import UserError
from common.protocols import RewardFunction, Split
from common.tasks import Prompts, answer_in
from common.types import Completion, Message, Prompt

_HELD_OUT = 0.3


@dataclass(frozen=True)
class _Question:
    text: str
    answer: str
    unit: tuple[str, ...]
    """Questions with the same unit are asked in the same split."""


def _first_letter() -> Iterator[_Question]:
    for word in _WORDS.split():
        yield _Question(f"What is the first letter of the word {word}?", word[0], (word,))


def _next_number() -> Iterator[_Question]:
    for number in range(1, 1000):
        yield _Question(f"What number comes after {number}?", str(number + 1), (str(number),))


def _larger() -> Iterator[_Question]:
    # As many numbers of one digit as of two and of three, so that two thirds of the pairs differ in length.
    chosen = random.Random("warmup larger")
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < 500:
        a, b = (chosen.randrange(10 ** (digits - 1), 10**digits) for digits in chosen.choices((1, 2, 3), k=2))
        if a != b:
            pairs.add((min(a, b), max(a, b)))
    for low, high in sorted(pairs):
        for a, b in (low, high), (high, low):
            yield _Question(f"Which number is larger, {a} or {b}?", str(high), (str(low), str(high)))


def _sum() -> Iterator[_Question]:
    for a in range(1, 20):
        for b in range(1, 21 - a):
            yield _Question(f"What is {a} + {b}?", str(a + b), (str(min(a, b)), str(max(a, b))))


_KINDS: dict[str, Callable[[], Iterator[_Question]]] = {
    "first_letter": _first_letter,
    "next_number": _next_number,
    "larger": _larger,
    "sum": _sum,
}


@functools.cache
def _pool(kind: str, split: Split) -> tuple[_Question, ...]:
    """Every question of this kind that may be asked in the split."""
    questions = list(_KINDS[kind]())
    units = sorted({question.unit for question in questions})
    random.Random(f"warmup held out {kind}").shuffle(units)
    held_out = set(units[: round(_HELD_OUT * len(units))])
    return tuple(question for question in questions if (question.unit in held_out) == (split == "test"))


class Warmup:
    """Generated first questions: first letter, next number, larger of two, small sums; needs no download.

    Options: ``seed`` draws the questions; ``train_questions`` and ``test_questions`` are the splits' sizes;
    ``shots`` is the number of worked examples before each question; ``kinds`` chooses among ``first_letter``,
    ``next_number``, ``larger`` and ``sum``, asked in turn.
    """

    def __init__(
        self,
        seed: int = 0,
        train_questions: int = 4000,
        test_questions: int = 200,
        shots: int = 1,
        kinds: Sequence[str] = tuple(_KINDS),
    ) -> None:
        for key, value, least in (
            ("seed", seed, 0), ("train_questions", train_questions, 1), ("test_questions", test_questions, 1),
            ("shots", shots, 0),
        ):  # fmt: skip
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"task.options.{key}={value!r} must be a whole number of at least {least}")
        if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds):
            raise UserError(f"task.options.kinds={kinds!r} must be a list of different kinds: {', '.join(_KINDS)}")
        for kind in kinds:
            if kind not in _KINDS:
                close = difflib.get_close_matches(str(kind), _KINDS, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise UserError(f"task.options.kinds has {kind!r}; {hint}there are {', '.join(_KINDS)}")
        if shots > 20:
            raise UserError(f"task.options.shots={shots} is more than the 20 that there are examples for; use 1")
        most = len(kinds) * min(len(_pool(kind, "test")) for kind in kinds)
        if test_questions > most:
            raise UserError(
                f"task.options.test_questions={test_questions} is more than the {most} held-out questions of "
                f"{', '.join(kinds)}; use at most {most}"
            )
        self._seed, self._shots, self._kinds = seed, shots, tuple(kinds)
        self._sizes: dict[Split, int] = {"train": train_questions, "test": test_questions}
        self.reward_weights: Mapping[str, float] = {"correct": 1.0, "format": 0.1}
        self.rewards: Mapping[str, RewardFunction] = {"correct": self._correct, "format": self._format}

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The kinds in turn; a kind's questions are asked once each before any is asked again (in train only)."""
        return Prompts(self._sizes[split], lambda index: self._prompt(split, index))

    def is_correct(self, prompt: Prompt, completion: Completion) -> bool:
        """The text in the tags is the answer, letters in either case. See ``common.tasks.answer_in``."""
        answer = answer_in(completion.text)
        return answer is not None and answer.lower() == prompt.data["answer"]

    def _correct(self, prompt: Prompt, completion: Completion) -> float:
        return float(self.is_correct(prompt, completion))

    def _format(self, prompt: Prompt, completion: Completion) -> float:
        return float(answer_in(completion.text) is not None)

    def _prompt(self, split: Split, index: int) -> Prompt:
        kind = self._kinds[index % len(self._kinds)]
        pool = _pool(kind, split)
        turn, place = divmod(index // len(self._kinds), len(pool))
        question = pool[_order(self._seed, kind, split, turn)[place]]
        # Examples are training questions in both splits, and never the question's own twin.
        chosen = random.Random(f"warmup examples {self._seed} {split} {index}")
        examples: list[_Question] = []
        while len(examples) < self._shots:
            example = chosen.choice(_pool(kind, "train"))
            if example.unit not in {question.unit, *(other.unit for other in examples)}:
                examples.append(example)
        messages: list[Message] = []
        for example in examples:
            messages.append({"role": "user", "content": example.text})
            messages.append({"role": "assistant", "content": f"<answer>{example.answer}</answer>"})
        # Without an example nothing else would show the format.
        asked = question.text if examples else f"{question.text} Reply as <answer>…</answer>."
        messages.append({"role": "user", "content": asked})
        data = {"kind": kind, "question": question.text, "answer": question.answer}
        return Prompt(id=f"{split}-{index}", messages=tuple(messages), data=data)


@functools.lru_cache(maxsize=64)
def _order(seed: int, kind: str, split: Split, turn: int) -> list[int]:
    order = list(range(len(_pool(kind, split))))
    random.Random(f"warmup order {seed} {kind} {split} {turn}").shuffle(order)
    return order


# Written for this file: short common words, some for nearly every letter.
_WORDS = """
able acid acorn actor adult agent album alley anchor angle animal ankle answer apple april apron arch arena arm army
arrow artist autumn awake baby back badge bag ball bamboo banana band bank barn barrel basin basket bath battle beach
bead beam bean bear beard beaver bed bee bell belt bench berry bicycle bird biscuit blanket blue board boat body bone
book boot border bottle bowl box boy branch brave bread breeze brick bridge bright broom brother brown brush bubble
bucket bug building butter button cabin cable cactus cage cake calm camel camera camp canal candle candy canoe cap car
card carpet carrot cart castle cat cave ceiling cellar cereal chain chair chalk cheese cherry chess chest chicken
child chin church circle circus city class clay clean clock cloth cloud clown coach coal coast coat coffee coin cold
collar color comb comet cookie copper coral corn corner cotton couch cousin cow crab crane crayon cream creek crow
crowd crown cup curtain cushion daisy dance dark daughter dawn day deer desert desk dew diamond dinner dish doctor dog
doll dolphin donkey door dragon dream dress drink drum duck dune dust eagle ear early earth easel east echo edge egg
eight elbow elephant elf elm empty engine envelope evening eye fabric face factory fairy family farm farmer fast
father feast feather fence fern ferry field finger fire fish five flag flame flock flood floor flour flower flute foam
fog forest fork fossil fountain fox frame friend frog frost fruit funny gallery game garage garden garlic gate gentle
ghost giant gift ginger giraffe girl glass globe glove glue goat gold goose grain grandma grape grass gravel gravy
green grocery guest guitar gum hair hall hammer hand happy harbor hat hawk hay head heart heavy hedge helmet hen herb
hero hill hive hockey hole home honey hood hook horn horse hotel hour house hungry hut ice icicle idea igloo inch ink
insect iris iron island ivory ivy jacket jam jar jaw jeans jelly jewel job joke journey judge jug juice july june
jungle junior kettle key kick kind king kitchen kite kitten knee knife knight knot koala ladder lady lake lamb lamp
land lantern lawn lazy leaf leather lemon letter lid light lily lime lion lip little lizard lobster lock log lucky
lunch lung magic magnet maid mango map maple marble march market mask meadow meal melon metal middle milk mill minute
mirror mitten money monkey month moon morning moss moth mother motor mountain mouse mouth mud muffin museum music
mustard nail name napkin narrow nature neck needle nephew nest net new night nine noise noodle noon north nose note
novel nurse nut oak oat ocean office oil old olive onion orange orbit orchard organ otter oven owl oyster paddle page
paint palace palm pan panda paper parade parent park parrot party path peach peacock peanut pear pearl pebble pen
pencil penguin people pepper piano picnic picture pig pigeon pillow pilot pine pink pipe pirate pizza planet plate
plum pocket poem point pole pond pony pool potato powder prince puddle pumpkin puppet puppy purple puzzle quail
quarter queen quick quiet quilt quiz rabbit raccoon radio rain ranch raven razor recipe red rhyme ribbon rice riddle
ring river road robin robot rock roof room root rope rose round ruby rug ruler rusty saddle sail salad salmon salt
sand sauce scarf school scissors sea seal season seat second seed seven shadow shark sheep shelf shell ship shirt shoe
shop shore short shoulder shovel silk silver simple sink sister six skirt sky sled sleep slow small smile smoke snail
snake snow soap sock sofa soft soil song soup south spice spider sponge spoon spring square squirrel stable star
station steam steel stem stick stone storm story stove straw stream street string sugar summer sun swan sweater sweet
swim table tail tall tea teacher team temple tent theater thin thread three throat thumb thunder ticket tiger tile
tiny toast tomato tongue tool tooth tower town toy tractor train tray tree triangle truck trumpet trunk tulip tunnel
turkey turtle twelve twig two ugly umbrella uncle under uniform upper urban urn useful valley van vase velvet verse
vest video village vine violet violin visit voice volcano voyage wagon waist wall walnut warm watch water wave wax
weather weed week well west whale wheat wheel whistle white wide willow wind window winter wise wolf wood wool word
world worm wrist yard yarn year yellow yogurt young zebra zero zipper zoo
"""
