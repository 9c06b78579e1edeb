"""The text to calibrate on where none is given: made from a seed, the same everywhere, of many kinds so that many channels speak.

Stories, explanations, letters, dialogues, lists, sums, tables, code and some other languages, from sentences with slots. About
100,000 characters.
"""

import random
from collections.abc import Callable

__all__ = ["bundled_text"]

SEED, NUM_PIECES = 20240, 440


def _list(text: str) -> list[str]:
    return " ".join(text.split()).split(", ")


NAMES = _list("""Anna, Boris, Chen, Dalia, Emeka, Farah, Goran, Hana, Ivo, Jun, Karim, Lena, Mateo, Nour, Otto, Priya, Rosa, Sven,
    Tala, Uma, Viktor, Yara""")
PLACES = _list("""harbour, library, orchard, workshop, railway station, market square, lighthouse, bakery, museum, greenhouse, mountain
    hut, river bank, concert hall, kitchen, school yard, observatory""")
THINGS = _list("""lantern, bicycle, notebook, violin, map, kettle, telescope, basket of pears, broken clock, red umbrella, wooden box,
    letter without a stamp, compass, pair of boots, jar of honey""")
ADJECTIVES = _list("""quiet, old, narrow, bright, patient, careful, stubborn, cold, warm, heavy, curious, empty, green, distant, gentle,
    sudden""")
VERBS = _list("""carried, repaired, forgot, found, painted, borrowed, counted, hid, measured, polished, sold, remembered""")
WEATHER = _list("""rain fell on the roofs, the wind turned north, fog lay over the fields, the sun came out, the first snow stayed,
    thunder rolled far away, it was too hot to walk""")
SUBJECTS = {
    "a heat pump": "moves heat from a cold place to a warm one by letting a fluid evaporate, compressing it and letting it condense",
    "a database index": "keeps the keys in order, so that a search looks at a few pages instead of every row",
    "yeast": "eats sugar and gives off carbon dioxide and alcohol, which is why dough rises and must is turned into wine",
    "a tide": "follows the moon, whose pull is stronger on the near side of the earth than on the far side",
    "a hash function": "maps text of any length to a number of fixed size, and a small change gives a very different number",
    "a violin string": "swings as a whole and in halves, thirds and quarters at once, and the mixture makes the colour of the tone",
    "the immune system": "remembers the shape of what it has fought, so a second infection meets prepared cells",
    "inflation": "means that the same money buys less, and it is measured on a basket of goods that changes slowly",
    "a neural network": "multiplies its input by matrices that were adjusted, step by step, until the error became small",
    "a glacier": "is snow that became ice under its own weight and now flows downhill more slowly than anyone can see",
    "a lens": "bends light because light is slower in glass than in air",
    "a contract": "binds those who agreed to it, as long as what was agreed is lawful and possible",
}
FOREIGN = [
    "Der Zug nach {n} fährt um {a} Uhr {b} ab. Bitte seien Sie rechtzeitig am Bahnsteig {c}.",
    "Le marché ouvre à {a} heures; on y trouve du pain, des pommes et {b} sortes de fromage.",
    "El tren sale a las {a} y {b}, pero {n} siempre llega {c} minutos tarde.",
    "Il treno delle {a} è in ritardo di {b} minuti, disse {n}.",
    "Поезд отправляется в {a} часов {b} минут.",
    "今天气温是{a}度,明天会下雨,{n}带了伞。",
    "電車は{a}時{b}分に出ます。",
    "القطار يغادر الساعة {a} و{b} دقيقة.",
]
CODE = [
    "def {f}(values):\n    total = 0\n    for value in values:\n        if value % {a} == 0:\n"
    "            total += value\n    return total\n",
    'for (int i = 0; i < {a}; i++) {{\n    if (table[i] == NULL) continue;\n    printf("%d: %s\\n", i, table[i]->name);\n}}\n',
    "SELECT name, COUNT(*) FROM orders WHERE price > {a}.{b} GROUP BY name ORDER BY 2 DESC LIMIT {c};\n",
    '{{"id": {a}, "name": "{n}", "tags": ["{t}", "new"], "price": {b}.{c}, "available": true}}\n',
    "class {n}(Base):\n    limit = {a}\n\n    def __init__(self, size):\n        self.size = min(size, self.limit)\n",
    "$ ls -l /var/log | sort -k5 -n | tail -n {c}\n-rw-r--r-- 1 root root {a}{b} Jan {c} 10:{b} server.log\n",
    "fn {f}(x: u32) -> Option<u32> {{\n    x.checked_mul({a})?.checked_add({b})\n}}\n",
]


class _Writer:
    """One piece a call; `one` draws from a list."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.one = rng.choice

    def number(self) -> int:
        return self.rng.choice((self.rng.randint(0, 9), self.rng.randint(10, 99), self.rng.randint(100, 9999)))

    def sentence(self, name: str, other: str) -> str:
        one = self.one
        forms = (
            f"{name} {one(VERBS)} the {one(THINGS)} in the {one(PLACES)}.",
            f"In the {one(ADJECTIVES)} {one(PLACES)} {name} met {other}, who had {one(VERBS)} a {one(THINGS)} that morning.",
            f'"Have you seen my {one(THINGS)}?" asked {name}. "Not since {one(WEATHER)}," said {other}.',
            f"Then {one(WEATHER)}, and the {one(ADJECTIVES)} street was empty for {self.number()} minutes.",
            f"Because {one(WEATHER)}, {other} stayed at the {one(PLACES)} and {one(VERBS)} the {one(THINGS)}.",
            f"Nobody knew why the {one(THINGS)} was so {one(ADJECTIVES)}, but {name} kept it.",
            f"It took {name} {self.number()} days to understand what {other} had meant.",
        )
        return one(forms)

    def story(self) -> str:
        name, other = self.rng.sample(NAMES, 2)
        return f"Once, when {self.one(WEATHER)}, {name} walked to the {self.one(PLACES)}. " + " ".join(
            self.sentence(name, other) for _ in range(self.rng.randint(3, 7))
        )

    def explanation(self) -> str:
        thing, fact = self.one(list(SUBJECTS.items()))
        question = self.one((f"What does {thing} do?", f"Explain {thing} in one sentence.", f"How would you describe {thing}?"))
        limit = f"It is worth knowing that this has limits: {self.one(ADJECTIVES)} cases behave differently."
        return f"Question: {question}\nAnswer: In short, {thing} {fact}. {limit}"

    def dialogue(self) -> str:
        a, b = self.number(), self.number()
        name, word = self.one(NAMES), self.one(ADJECTIVES)
        turns = (
            f"User: Hello, I am {name}.\nAssistant: Hello {name}! How can I help you?",
            f"User: What is {a} + {b}?\nAssistant: {a} + {b} = {a + b}.",
            f"User: Which is larger, {a} or {b}?\nAssistant: {max(a, b)} is larger."
            if a != b
            else "User: Thank you!\nAssistant: You are welcome.",
            f"User: Spell {word}.\nAssistant: " + " ".join(word),
            f"User: Write one line about the {self.one(PLACES)}.\n"
            f"Assistant: It was {self.one(ADJECTIVES)} when {self.one(WEATHER)}.",
        )
        return "\n".join(self.rng.sample(turns, 3))

    def listing(self) -> str:
        items = self.rng.sample(THINGS, 4)
        rows = "\n".join(
            f"{i}. {item.capitalize()}: {self.number()} pieces, {self.number()}.{self.rng.randint(10, 99)} each"
            for i, item in enumerate(items, 1)
        )
        return f"Inventory of the {self.one(PLACES)}, page {self.number()}\n{rows}\nTotal: {self.number()}"

    def letter(self) -> str:
        name, other = self.rng.sample(NAMES, 2)
        news = f"{self.sentence(name, other)} {self.sentence(other, name)}"
        return f"Dear {name},\n\n{news} Please send {self.number()} more before Friday.\n\nYours, {other}"

    def filled(self, forms: list[str]) -> str:
        values = {"a": self.number(), "b": self.rng.randint(10, 59), "c": self.rng.randint(1, 12)}
        return self.one(forms).format(n=self.one(NAMES), t=self.one(ADJECTIVES), f=self.one(VERBS), **values)

    def code(self) -> str:
        return "```\n" + self.filled(CODE) + "```"

    def foreign(self) -> str:
        return self.filled(FOREIGN)


def bundled_text() -> str:
    writer = _Writer(random.Random(SEED))
    kinds: list[Callable[[], str]] = [
        writer.story,
        writer.story,
        writer.explanation,
        writer.dialogue,
        writer.listing,
        writer.letter,
        writer.code,
        writer.foreign,
    ]
    return "\n\n".join(kinds[i % len(kinds)]() for i in range(NUM_PIECES)) + "\n"
