"""Scenes into English and back: captions for training, and a tolerant reader that scores a captioner."""

from __future__ import annotations

import re
from dataclasses import dataclass

from scripts.toyworld.looks import NAMED, Look
from scripts.toyworld.scene import COLOURS, KINDS, Scene, Thing

VARIANTS = 8

# Two ways to name each setting; the first is the canonical one.
_SETTING_PHRASES: dict[str, tuple[str, str]] = {
    "meadow": ("in a meadow", "on a grassy meadow"),
    "beach": ("on a beach", "on a sandy beach"),
    "city": ("in a city", "on a city street"),
    "snow": ("in the snow", "on a snowy day"),
    "space": ("in space", "on a moon in space"),
    "kitchen": ("in a kitchen", "on a kitchen counter"),
}
_PLACE_PHRASES = {"left": "on the left", "centre": "in the centre", "right": "on the right"}

# What a look's picture is called, and its style in a word or two; the flat look has neither.
_LOOK_WORDS: dict[str, tuple[str, str]] = {
    "cartoon": ("cartoon", "cartoon"),
    "cel shaded": ("anime drawing", "cel shaded"),
    "watercolour": ("watercolour painting", "watercolour"),
    "ink": ("ink sketch", "ink sketch"),
    "crayon": ("crayon drawing", "crayon"),
    "pencil": ("pencil drawing", "pencil drawing"),
    "oil": ("oil painting", "oil painting"),
    "comic": ("comic book page", "comic book"),
    "paper cut": ("paper cut-out", "paper cut"),
    "mosaic": ("mosaic", "mosaic"),
    "pixel": ("pixel art image", "pixel art"),
    "low poly": ("low poly model", "low poly"),
    "knitted": ("knitted picture", "knitted"),
    "clay": ("clay model", "clay"),
    "plastic": ("plastic toy photo", "plastic toy"),
    "felt": ("felt toy photo", "felt"),
    "metal": ("metal figure photo", "metal"),
    "crystal": ("crystal figure photo", "crystal"),
    "diorama": ("diorama", "diorama"),
}
_SAID_OF = {  # parameters of a look that has no name
    "shading": "{} shading",
    "material": "made of {}",
    "texture": "{} texture",
    "palette": "{} colours",
    "background": "{} background",
}

# Words a captioner or a person may use instead of ours.
_KIND_WORDS = {kind: kind for kind in KINDS} | {
    "kitten": "cat",
    "cottage": "house",
    "automobile": "car",
    "spaceship": "rocket",
    "mug": "cup",
    "teacup": "cup",
    "sailboat": "boat",
    "ship": "boat",
    "toadstool": "mushroom",
}
_COLOUR_WORDS = {colour: colour for colour in COLOURS} | {"violet": "purple", "golden": "yellow", "dark": "black"}
_SETTING_WORDS = {
    "meadow": "meadow",
    "field": "meadow",
    "grass": "meadow",
    "grassy": "meadow",
    "beach": "beach",
    "sand": "beach",
    "sandy": "beach",
    "sea": "beach",
    "city": "city",
    "town": "city",
    "street": "city",
    "snow": "snow",
    "snowy": "snow",
    "winter": "snow",
    "space": "space",
    "moon": "space",
    "kitchen": "kitchen",
    "counter": "kitchen",
}


@dataclass(frozen=True)
class Mention:
    """One thing that a text names; None where the text gives no colour."""

    kind: str
    colour: str | None


@dataclass(frozen=True)
class Reading:
    """What a text says: its things in the order named, and the setting, None where there is none."""

    things: tuple[Mention, ...]
    setting: str | None


def caption(scene: Scene, variant: int = 0) -> str:
    """The scene in lower case English. Variant 0 is canonical; 1 to 7 rephrase it, some without size or place."""
    if not 0 <= variant < VARIANTS:
        raise ValueError(f"a caption variant lies in 0..{VARIANTS - 1}, got {variant}")
    if len(scene.things) == 1:
        return _one(scene.things[0], _SETTING_PHRASES[scene.setting], variant)
    return _two(scene.things[0], scene.things[1], _SETTING_PHRASES[scene.setting], variant)


def styled(content: str, look: Look, variant: int = 0) -> str:
    """A caption of this variant with its look behind or before it; the flat look goes without saying."""
    for name, (picture, style) in _LOOK_WORDS.items():
        if look == NAMED[name]:
            return (
                f"{content}, {style}",
                f"{picture} of {content}",
                f"{_article(picture)} of {content}",
                f"{content}, {picture}",
                f"{style} style, {content}",
                f"{content}, in {style} style",
                f"{content}, {style} style",
                f"{content} as {_article(picture)}",
            )[variant]
    plain = Look()
    said = [
        phrase.format(getattr(look, name))
        for name, phrase in _SAID_OF.items()
        if getattr(look, name) != getattr(plain, name)
    ]
    if look.line != "own" and look.outline:
        said.append(f"{'thick' if look.outline > 0.01 else 'thin'} {look.line} outlines")
    # Half of the captions leave one word out, but never the last: without any it would mean the flat look.
    return ", ".join([content, *said[variant % 2 if len(said) > 1 else 0 :]])


def read_caption(text: str) -> Reading:
    """Things, colours and setting that `text` names, in any wording close to ours.

    A colour belongs to the next thing named ("a red cat"), or to the last one that has none yet ("a cat that is red").
    """
    things: list[Mention] = []
    pending: str | None = None
    setting: str | None = None
    for word in re.findall(r"[a-z]+", text.lower()):
        singular = word[:-1] if word.endswith("s") and word[:-1] in _KIND_WORDS else word
        if singular in _KIND_WORDS:
            things.append(Mention(_KIND_WORDS[singular], pending))
            pending = None
        elif word in _COLOUR_WORDS:
            pending = _COLOUR_WORDS[word]
        elif word in ("is", "and", "a", "an", "the", "on", "in", "that", "beside"):
            # A colour left hanging before a new phrase was said of the thing before it.
            things, pending = _settle(things, pending)
        setting = setting or _SETTING_WORDS.get(word)
    things, _ = _settle(things, pending)
    return Reading(tuple(things), setting)


def _one(thing: Thing, phrases: tuple[str, str], variant: int) -> str:
    where, elsewhere = phrases
    full, plain, place = _full(thing), _plain(thing), _PLACE_PHRASES[thing.place]
    return (
        f"{full} {place}, {where}",
        f"{plain} {where}",
        f"{full} {elsewhere}",
        f"{where} there is {full} {place}",
        f"{plain} {place}, {elsewhere}",
        f"{elsewhere}, {full}",
        f"there is {plain} {where}",
        f"{_article(thing.kind)} that is {thing.colour}, {where}",
    )[variant]


def _two(first: Thing, second: Thing, phrases: tuple[str, str], variant: int) -> str:
    where, elsewhere = phrases
    full, plain = (_full(first), _full(second)), (_plain(first), _plain(second))
    places = (_PLACE_PHRASES[first.place], _PLACE_PHRASES[second.place])
    return (
        f"{full[0]} and {full[1]}, {where}",
        f"{plain[0]} and {plain[1]} {where}",
        f"{full[0]} {places[0]} and {full[1]} {places[1]}, {elsewhere}",
        f"{where} there are {full[0]} and {full[1]}",
        f"{plain[0]} next to {plain[1]}, {elsewhere}",
        f"{elsewhere}, {plain[0]} beside {plain[1]}",
        f"there are {plain[0]} {places[0]} and {plain[1]} {places[1]}, {where}",
        f"{_article(first.kind)} that is {first.colour} and {_article(second.kind)} that is {second.colour}, {where}",
    )[variant]


def _full(thing: Thing) -> str:
    return _article(f"{thing.size} {thing.colour} {thing.kind}")


def _plain(thing: Thing) -> str:
    return _article(f"{thing.colour} {thing.kind}")


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _settle(things: list[Mention], pending: str | None) -> tuple[list[Mention], str | None]:
    """Gives a hanging colour to the last thing, if that has none."""
    if pending is not None and things and things[-1].colour is None:
        return [*things[:-1], Mention(things[-1].kind, pending)], None
    return things, pending
