"""Questions on a scene. Each asks one turn, may change the scene, and says which group the talk is now about."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from scripts.toytalk.conversation import Turn
from scripts.toytalk.scenes import MOST_OF_A_KIND, Group, TalkScene
from scripts.toytalk.words import (
    COLOURS,
    KINDS,
    NUMBER_WORDS,
    PLACE_PHRASES,
    PLURALS,
    SETTING_PHRASES,
    SIZES,
    article,
    capitalised,
    joined,
    noun,
    weighted,
)


@dataclass(frozen=True)
class Asked:
    """A turn, and where the talk stands after it: the scene and the group that "it" or "they" now means."""

    turn: Turn
    scene: TalkScene
    topic: Group | None = None


Asker = Callable[[TalkScene, Group | None, random.Random], Asked | None]


def ask_about_scene(scene: TalkScene, topic: Group | None, rng: random.Random) -> Asked:
    """A question that fits the scene, in terms of `topic` ("it", "they") where there is one."""
    while True:
        asker = weighted(ASKERS, rng)
        if asked := asker(scene, topic, rng):
            return asked


def colour(scene: TalkScene, topic: Group | None, rng: random.Random) -> Asked | None:
    group, name = chosen(scene, topic, rng)
    questions = [f"What colour {group.be} {name}?", f"Which colour {has(group)} {name}?"]
    if name == group.the:
        questions += [f"What is the colour of {group.the}?", f"Tell me the colour of {group.the}."]
        questions += [f"And {group.the}, what colour?", f"{capitalised(group.the)}: which colour?"]
    answer = f"{capitalised(group.the)} {group.be} {group.colour}."
    return Asked(turn(scene, rng.choice(questions), answer, "colour", group.colour), scene, group)


def is_colour(scene: TalkScene, topic: Group | None, rng: random.Random) -> Asked | None:
    group, name = chosen(scene, topic, rng)
    guess = group.colour if rng.random() < 0.5 else rng.choice(list(COLOURS))
    verdict = "yes" if guess == group.colour else "no"
    answer = f"{capitalised(verdict)}, {group.the} {group.be} {group.colour}."
    question = rng.choice([f"{capitalised(group.be)} {name} {guess}?", f"Would you say {name} {group.be} {guess}?"])
    return Asked(turn(scene, question, answer, "is_colour", verdict, group.colour), scene, group)


def count(scene: TalkScene, topic: Group | None, rng: random.Random) -> Asked | None:
    group, name = chosen(scene, topic, rng)
    plural = PLURALS[group.kind]
    if name == "they":
        questions = ["How many are there?", "How many of them are there?"]
    else:
        questions = [f"How many {plural} are there?", f"How many {plural} do you see?", f"Count the {plural}."]
    return Asked(turn(scene, rng.choice(questions), amount(group), "count", number(group.count)), scene, group)


def count_none(scene: TalkScene, _topic: Group | None, rng: random.Random) -> Asked | None:
    kind = absent_kind(scene, rng)
    question = rng.choice([f"How many {PLURALS[kind]} are there?", f"How many {PLURALS[kind]} do you see?"])
    return Asked(turn(scene, question, f"There are no {PLURALS[kind]}.", "count_none", "no"), scene)


def total(scene: TalkScene, _topic: Group | None, rng: random.Random) -> Asked | None:
    if scene.total >= len(NUMBER_WORDS):  # so many have come that there is no word for it
        return None
    question = rng.choice(["How many things are there?", "How many things do you see?", "How many things in all?"])
    be, things = ("is", "thing") if scene.total == 1 else ("are", "things")
    return Asked(
        turn(scene, question, f"There {be} {number(scene.total)} {things}.", "total", number(scene.total)), scene
    )


def exists(scene: TalkScene, _topic: Group | None, rng: random.Random) -> Asked | None:
    if rng.random() < 0.5:
        group = rng.choice(scene.groups)
        plural = group.count > 1 or rng.random() < 0.3
        question = f"Are there any {PLURALS[group.kind]}?" if plural else f"Is there {article(group.kind)}?"
        return Asked(turn(scene, question, f"Yes, there {group.be} {group.phrase}.", "exists", "yes"), scene, group)
    kind = absent_kind(scene, rng)
    question = rng.choice(
        [f"Is there {article(kind)}?", f"Are there any {PLURALS[kind]}?", f"Do you see {article(kind)}?"]
    )
    return Asked(turn(scene, question, f"No, there is no {kind}.", "exists", "no"), scene)


def absent(scene: TalkScene, _topic: Group | None, rng: random.Random) -> Asked | None:
    """A question on something that is not there has an answer too."""
    kind = absent_kind(scene, rng)
    question = rng.choice([f"What colour is the {kind}?", f"How big is the {kind}?", f"Where is the {kind}?"])
    return Asked(turn(scene, question, f"There is no {kind}.", "absent", "no", kind), scene)


def setting(scene: TalkScene, topic: Group | None, rng: random.Random) -> Asked | None:
    if scene.setting is None:
        return None
    where = SETTING_PHRASES[scene.setting][1]
    group, name = chosen(scene, topic, rng)
    if group.place is None and rng.random() < 0.6:
        answer = f"{capitalised(group.the)} {group.be} {where}."
        return Asked(turn(scene, f"Where {group.be} {name}?", answer, "setting", scene.setting), scene, group)
    question = rng.choice(["Where is all this?", "What place is this?", "Where are we?"])
    return Asked(turn(scene, question, f"We are {where}.", "setting", scene.setting), scene)


def place(scene: TalkScene, topic: Group | None, rng: random.Random) -> Asked | None:
    group, name = chosen(scene, topic, rng)
    if group.place is None:
        return None
    where = PLACE_PHRASES[group.place]
    answer = f"{capitalised(group.the)} {group.be} {where}."
    question, word = f"Where {group.be} {name}?", group.place
    if rng.random() < 0.5:
        question, word = (
            rng.choice([f"What is {where}?", f"What do you see {where}?", f"Which thing is {where}?"]),
            group.kind,
        )
    return Asked(turn(scene, question, answer, "place", word), scene, group)


def beside(scene: TalkScene, _topic: Group | None, rng: random.Random) -> Asked | None:
    spots = {group.place: group for group in scene.groups if group.place}
    pairs = [(spots[a], spots[b]) for a, b in (("left", "centre"), ("centre", "right")) if a in spots and b in spots]
    if not pairs:
        return None
    left, right = rng.choice(pairs)
    thing, other, side = (left, right, "left") if rng.random() < 0.5 else (right, left, "right")
    question = rng.choice([f"What is just {side} of {other.the}?", f"What stands next to {other.the}, on its {side}?"])
    answer = f"{capitalised(thing.the)} {thing.be} just {side} of {other.the}."
    return Asked(turn(scene, question, answer, "beside", thing.kind), scene, thing)


def which(scene: TalkScene, _topic: Group | None, rng: random.Random) -> Asked | None:
    seen = rng.choice(scene.groups).colour
    groups = [group for group in scene.groups if group.colour == seen]
    question = rng.choice([f"What is {seen}?", f"Which things are {seen}?", f"What do you see that is {seen}?"])
    be = groups[0].be if len(groups) == 1 else "are"
    answer = f"{capitalised(joined([group.the for group in groups]))} {be} {seen}."
    words = [group.kind for group in groups]
    return Asked(turn(scene, question, answer, "which", *words), scene, groups[0] if len(groups) == 1 else None)


def size(scene: TalkScene, topic: Group | None, rng: random.Random) -> Asked | None:
    group, name = chosen(scene, topic, rng)
    if group.size is None:
        return None
    answer = f"{capitalised(group.the)} {group.be} {group.size}."
    if rng.random() < 0.6:
        choice = rng.choice(["big or small", "small or big"])
        question = rng.choice([f"How big {group.be} {name}?", f"{capitalised(group.be)} {name} {choice}?"])
        return Asked(turn(scene, question, answer, "size", group.size), scene, group)
    guess = rng.choice(SIZES)
    verdict = "yes" if guess == group.size else "no"
    answer = f"{capitalised(verdict)}, {group.the} {group.be} {group.size}."
    return Asked(
        turn(scene, f"{capitalised(group.be)} {name} {guess}?", answer, "is_size", verdict, group.size), scene, group
    )


def list_colours(scene: TalkScene, _topic: Group | None, rng: random.Random) -> Asked | None:
    colours = list(dict.fromkeys(group.colour for group in scene.groups))
    question = rng.choice(
        ["List the colours.", "Which colours are there?", "Name all the colours.", "What colours do you see?"]
    )
    head = "The colours are" if len(colours) > 1 else "The colour is"
    return Asked(turn(scene, question, f"{head} {joined(colours)}.", "list_colours", *colours), scene)


def list_things(scene: TalkScene, _topic: Group | None, rng: random.Random) -> Asked | None:
    question = rng.choice(["What is there?", "List the things.", "What do you see?", "Name everything you see."])
    words = [word for group in scene.groups for word in (group.colour, group.kind)]
    answer = f"There {scene.groups[0].be} {joined([group.phrase for group in scene.groups])}."
    return Asked(turn(scene, question, answer, "list_things", *words), scene)


def compare(scene: TalkScene, _topic: Group | None, rng: random.Random) -> Asked | None:
    if len(scene.groups) < 2:
        return None
    one, two = rng.sample(scene.groups, 2)
    if one.count == two.count:
        return None
    more = max(one, two, key=lambda group: group.count)
    first, second = PLURALS[one.kind], PLURALS[two.kind]
    question = rng.choice([f"Are there more {first} or {second}?", f"Which are more, the {first} or the {second}?"])
    return Asked(turn(scene, question, f"There are more {PLURALS[more.kind]}.", "compare", more.kind), scene, more)


def repaint(scene: TalkScene, topic: Group | None, rng: random.Random) -> Asked | None:
    group, name = chosen(scene, topic, rng)
    wanted = rng.choice([word for word in COLOURS if word != group.colour])
    new = replace(group, colour=wanted)
    changed = scene.with_group(group, new)
    it = {"it": "it", "they": "them"}.get(name, name)
    question = rng.choice([f"Paint {it} {wanted}.", f"Now make {it} {wanted}.", f"Please paint {it} {wanted}."])
    answer = f"Now {group.the} {group.be} {wanted}."
    asked = turn(changed, question, answer, "repaint", wanted)
    return Asked(replace(asked, keys=(*scene.keys, *changed.keys)), changed, new)


def more_come(scene: TalkScene, _topic: Group | None, rng: random.Random) -> Asked | None:
    group = rng.choice(scene.groups)
    if rng.random() < 0.6 or group.count == 1:
        change = rng.randint(1, 3)
        after, verb = (
            group.count + change,
            rng.choice(["come" if change > 1 else "comes", "arrive" if change > 1 else "arrives"]),
        )
        what = f"{capitalised(NUMBER_WORDS[change])} more {noun(group.kind, change)} {verb}"
    else:
        change = rng.randint(1, group.count - 1)
        after, verb = group.count - change, "go away" if change > 1 else "goes away"
        what = f"{capitalised(NUMBER_WORDS[change])} {noun(group.kind, change)} {verb}"
    if after > MOST_OF_A_KIND + 3:
        return None
    new = replace(group, count=after)
    changed = scene.with_group(group, new)
    question = f"{what}. How many {PLURALS[group.kind]} are there now?"
    answer = f"Now there {new.be} {number(after)} {new.noun}."
    return Asked(turn(changed, question, answer, "more_come", number(after)), changed, new)


# How often each is asked.
ASKERS: dict[Asker, float] = {
    colour: 5.0,
    is_colour: 2.0,
    count: 4.0,
    count_none: 0.7,
    total: 1.5,
    exists: 1.5,
    absent: 0.7,
    setting: 2.0,
    place: 4.0,
    beside: 1.5,
    which: 2.0,
    size: 2.5,
    list_colours: 1.0,
    list_things: 1.5,
    compare: 1.0,
    repaint: 1.0,
    more_come: 1.0,
}


def turn(scene: TalkScene, question: str, answer: str, skill: str, *words: str) -> Turn:
    return Turn(question, answer, skill, words, scene.keys)


def chosen(scene: TalkScene, topic: Group | None, rng: random.Random) -> tuple[Group, str]:
    """A group to ask about and what to call it: the topic as "it" or "they", any group by its name."""
    if topic is not None and rng.random() < 0.35:
        return topic, "it" if topic.count == 1 else "they"
    group = rng.choice(scene.groups)
    return group, group.the


def absent_kind(scene: TalkScene, rng: random.Random) -> str:
    return rng.choice([kind for kind in KINDS if kind not in {group.kind for group in scene.groups}])


def amount(group: Group) -> str:
    return f"There {group.be} {number(group.count)} {group.noun}."


def number(value: int) -> str:
    return NUMBER_WORDS[value]


def has(group: Group) -> str:
    return "has" if group.count == 1 else "have"
