"""Toy scenes in words: what stands where, and how a user's turn describes it."""

import random
from dataclasses import dataclass, replace

from scripts.toytalk.words import (
    COLOURS,
    KINDS,
    NUMBER_WORDS,
    PLACE_PHRASES,
    PLACES,
    SETTING_PHRASES,
    SETTINGS,
    SIZES,
    article,
    capitalised,
    joined,
    noun,
)

MOST_OF_A_KIND = 5


@dataclass(frozen=True)
class Group:
    """So many things of one kind and look; size and place where they are said."""

    count: int
    colour: str
    kind: str
    size: str | None = None
    place: str | None = None

    @property
    def noun(self) -> str:
        return noun(self.kind, self.count)

    @property
    def the(self) -> str:
        return f"the {self.noun}"

    @property
    def be(self) -> str:
        return "is" if self.count == 1 else "are"

    @property
    def phrase(self) -> str:
        """a small red robot; two blue cups."""
        words = " ".join(word for word in (self.size, self.colour, self.noun) if word)
        return article(words) if self.count == 1 else f"{NUMBER_WORDS[self.count]} {words}"

    @property
    def placed_phrase(self) -> str:
        return f"{self.phrase} {PLACE_PHRASES[self.place]}" if self.place else self.phrase


@dataclass(frozen=True)
class TalkScene:
    """Groups of different kinds, in a setting where one is said."""

    groups: tuple[Group, ...]
    setting: str | None

    @property
    def keys(self) -> tuple[str, ...]:
        """thing|colour|setting of each group, as in the split of the pictures."""
        return tuple(f"{group.kind}|{group.colour}|{self.setting or 'nowhere'}" for group in self.groups)

    @property
    def total(self) -> int:
        return sum(group.count for group in self.groups)

    def with_group(self, old: Group, new: Group) -> "TalkScene":
        return replace(self, groups=tuple(new if group is old else group for group in self.groups))


def sample_talk_scene(rng: random.Random) -> TalkScene:
    number = rng.choices((1, 2, 3, 4), (3, 5, 3, 1))[0]
    kinds = rng.sample(KINDS, number)
    colours = rng.sample(list(COLOURS), number) if rng.random() < 0.8 else rng.choices(list(COLOURS), k=number)
    counted = rng.random() < 0.65
    sized = rng.random() < 0.4
    places: list[str | None] = [None] * number
    if number in (2, 3) and rng.random() < 0.4:
        places = list(PLACES if number == 3 else ("left", "right"))
        if rng.random() < 0.3:
            rng.shuffle(places)
    groups = tuple(
        Group(
            count=rng.randint(1, MOST_OF_A_KIND) if counted else 1,
            colour=colour,
            kind=kind,
            size=rng.choice(SIZES) if sized else None,
            place=place,
        )
        for kind, colour, place in zip(kinds, colours, places, strict=True)
    )
    return TalkScene(groups, rng.choice(SETTINGS) if rng.random() < 0.8 else None)


def describe(scene: TalkScene, rng: random.Random) -> str:
    """The scene in one or a few sentences, in one of many wordings."""
    groups = scene.groups
    things = joined([group.placed_phrase for group in groups])
    where = SETTING_PHRASES[scene.setting][0] if scene.setting else ""
    there = "There is" if groups[0].count == 1 else "There are"
    style = rng.randrange(8)
    if style == 0 and where:
        return f"{capitalised(where)} {there.lower()} {things}."
    if style == 1 and where:
        return f"{capitalised(where)} I see {things}."
    if style == 2:
        return spaced("I see", things, where)
    if style == 3:
        return spaced("Look,", things, where)
    if style == 4:
        return spaced("Imagine", things, where)
    if style == 5:
        sentences = [f"There {group.be} {group.placed_phrase}." for group in groups]
        if where:
            sentences.append(f"{'It is' if scene.total == 1 else 'They are'} {where}.")
        return " ".join(sentences)
    if style == 6 and len(groups) > 1:
        rest = joined([group.placed_phrase for group in groups[1:]])
        return f"{spaced(there, groups[0].placed_phrase, where)} There {groups[1].be} also {rest}."
    return spaced(there, things, where)


def spaced(*words: str) -> str:
    return " ".join(word for word in words if word) + "."
