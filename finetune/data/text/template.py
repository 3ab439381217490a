"""Where in a rendered conversation the assistant's own characters are, for any chat template.

Where the template marks them (`{% generation %}`) the marks say so. Where it doesn't, an answer begins where the
rendering of the turns before it, with the prompt for an answer, ends, provided that this is how the whole begins; else,
and for an answer that the template shortens, a probe is written into the turn and the two renderings are compared.
What can't be shown to be an assistant's text is an error: there is no guessing.
"""

import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.spelling import setting
from finetune.data.text.formats import Conversation, Message
from finetune.errors import DataError
from finetune.reading import read_text

PROBE = "\ue0f3\ue0f7"  # private-use characters: no template strips them, nobody's text holds them
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
RENDER_BYTES = 2 * 2**30  # memory that one rendering may take; a template is a program, and may ask for any amount
LONGEST_COMMON_END = 16  # characters; </think> is 8
_limited = threading.Lock()  # a limit is the whole process's: one rendering at a time sets it and takes it back
SKIP = "or leave such rows out: data.skip_bad=true"
BUILT_IN_TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + END }}{% endgeneration %}"
    "{% else %}{{ message['content'] + END }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
}


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. spans: the trained characters, (from, to) each, end-of-turn tokens included.

    has_end_token: whether a token ends the last answer, if that is trained. shortened: answers that are incomplete.
    """

    text: str
    spans: list[tuple[int, int]]
    has_end_token: bool
    shortened: int


class Template:
    """A chat template with the tokens of its tokenizer. Pickles."""

    def __init__(self, tokenizer: Any, name: str = "") -> None:
        """name: empty for the tokenizer's own, one of several of its own, a built-in one, a file, or the text of one.

        Raises DataError where there is none such.
        """
        self.text = _template_text(tokenizer, name)
        self._names = dict(tokenizer.special_tokens_map)
        self._has_marks = bool(GENERATION.search(self.text))
        start = tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else None
        added = {*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values())}
        tokens = frozenset(token for token in added if token.strip() and token != start)
        longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
        self._token = re.compile(rf"\s*({'|'.join(longest_first)})" if longest_first else r"(?!)()")
        self._tokens = re.compile(rf"(?:{self._token.pattern})+")
        self._content_as_parts = False
        self._turn_ends: dict[tuple[str, ...], tuple[str, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_turn_ends": {}}

    def require(self) -> None:
        """Raises DataError if there is no template at all."""
        if not self.text:
            raise DataError(
                "the tokenizer has no chat template; take an instruction-tuned model, or name a template: "
                "data.chat_template=chatml"
            )

    def render(self, row: Conversation) -> Rendered:
        """A row as text, up to its last answer. Raises DataError naming the row."""
        answers = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
        turns = row.messages[: answers[-1] + 1]  # what follows is context of nothing
        turn_ends = self.turn_ends(turns, row.source)
        if self._has_marks and all(turns[index].trained for index in answers):
            return self._render_with_marks(turns, answers, turn_ends, row.source)
        text, _ = self._render(turns, row.source)
        spans: list[tuple[int, int]] = []
        shortened = 0
        for index, turn_end in zip(answers, turn_ends, strict=True):
            if turns[index].trained:
                begin, stop = self._answer_span(turns, index, text, row.source)
                shortened += not text[:stop].rstrip().endswith(turns[index].content.strip())
                spans.append((begin, self._past_turn_end(text, stop, turn_end, index == answers[-1], row.source)))
        return Rendered(text, spans, self.is_token(turn_ends[-1]) or not turns[-1].trained, shortened)

    def generation_prompt(self, turns: Sequence[Message], source: str) -> str:
        """Turns, rendered up to where the next answer begins. Raises DataError naming the source."""
        earlier = tuple(replace(turn, trained=False) for turn in turns)
        rendered = self.render(Conversation((*earlier, Message("assistant", "a")), source))
        before = rendered.text[: rendered.spans[0][0]]
        own = self._render_or_empty(turns, prompt=True)
        # The template's own may go on with the beginning of a thought; some templates ignore `add_generation_prompt`.
        return own if own.startswith(before) else before

    def turn_ends(self, turns: Sequence[Message], source: str) -> tuple[str, ...]:
        """What ends each answer of a conversation with these roles: a token, or a text where that is all there is.

        Raises DataError if the template leaves a turn out.
        """
        roles = tuple(turn.role for turn in turns)
        if roles not in self._turn_ends:
            placeholders = [Message(role, f"Zq{index}Zq") for index, role in enumerate(roles)]
            text = self._render_placeholders(placeholders, source)
            answers = [turn.content for turn in placeholders if turn.role == "assistant"]
            after = [text[text.rindex(answer) + len(answer) :] for answer in answers]
            self._turn_ends[roles] = tuple(self._turn_end(rest, after[-1]) for rest in after)
        return self._turn_ends[roles]

    def is_token(self, turn_end: str) -> bool:
        """Whether what ends a turn is a token (or several, of which the last one counts)."""
        return bool(turn_end) and self._tokens.fullmatch(turn_end) is not None

    def last_token(self, turn_end: str) -> str:
        """The token that ends a turn."""
        return self._token.findall(turn_end)[-1] if self.is_token(turn_end) else ""

    def _turn_end(self, rest: str, last: str) -> str:
        """What ends an answer that `rest` follows; `last` follows the last answer."""
        own, others = (list(self._token.finditer(self._leading_tokens(part))) for part in (rest, last))
        if own:
            # The tokens that stand behind every answer: one as a rule, Command R has two. Where there are none such,
            # the next turn's first token ends this one (GLM).
            shared = sum(1 for _ in itertools.takewhile(lambda p: p[0][1] == p[1][1], zip(own, others, strict=False)))
            return rest[own[0].start(1) : own[max(shared, 1) - 1].end()]
        # Without a token, a text that follows every answer: <|im_end|> in plain letters.
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(rest, last, strict=False))
        return "".join(character for character, _ in pairs).strip()

    def _leading_tokens(self, text: str) -> str:
        match = self._tokens.match(text)
        return match.group() if match else ""

    def _render_placeholders(self, turns: Sequence[Message], source: str) -> str:
        """A rendering of turns whose texts are placeholders. Raises DataError if one is left out."""
        try:
            return self._render_checked(turns, source)
        except DataError:
            # Templates of models that also see images take texts as lists of parts only.
            self._content_as_parts = not self._content_as_parts
            try:
                return self._render_checked(turns, source)
            except DataError:
                self._content_as_parts = not self._content_as_parts
            raise

    def _render_checked(self, turns: Sequence[Message], source: str) -> str:
        text, _ = self._render(turns, source)
        for number, turn in enumerate(turns, start=1):
            if turn.content not in text or (self._content_as_parts and "'type'" in text):
                raise DataError(
                    f"{source}: the chat template leaves out or rewrites turn {number} ({turn.role}); remove it from "
                    "the row, or take another template: data.chat_template=chatml"
                )
        return text

    def _past_turn_end(self, text: str, stop: int, turn_end: str, last: bool, source: str) -> int:
        """An answer's end, moved behind what ends its turn."""
        if turn_end:
            match = re.compile(rf"\s*{re.escape(turn_end)}").match(text, stop)
            if match is None:
                raise DataError(
                    f"{source}: the chat template ends other answers with {turn_end!r}, but behind this one stands "
                    f"{text[stop : stop + 30]!r}; correct the row or the template, {SKIP}"
                )
            stop = match.end()
        if last and not self.is_token(turn_end):
            return len(text)  # an end token follows, and nothing untrained may stand before it
        while last and (match := self._token.match(text, stop)):  # Phi has another token behind its end of turn
            stop = match.end()
        return stop

    def _answer_span(self, turns: Sequence[Message], index: int, text: str, source: str) -> tuple[int, int]:
        """The characters of an answer without what ends it: (from, to)."""
        before, content = turns[:index], turns[index].content.strip()
        prompt = self._render_or_empty(before, prompt=True)
        fits = bool(prompt) and text.startswith(prompt)
        if fits:
            at = text.find(content, len(prompt))
            if at >= 0 and not text[len(prompt) : at].strip():
                return len(prompt), at + len(content)
        # Either the template changes the text, or more than the text stands behind the prompt.
        stop = self._probe(turns, index, text, source, behind=True)
        # Behind a prompt that calls for the answer, all is the answer's (such as an empty thought). A template that
        # ignores `add_generation_prompt` writes its heading there, which is not the assistant's.
        if fits and len(prompt) <= stop and prompt != self._render_or_empty(before, prompt=False):
            return len(prompt), stop
        return self._probe(turns, index, text, source, behind=False), stop

    def _probe(self, turns: Sequence[Message], index: int, text: str, source: str, *, behind: bool) -> int:
        """Where a turn's text begins (or, `behind`, ends), found by writing a probe there."""
        whole = turns[index].content
        places = [len(whole)] if behind else [0]
        if not behind:
            # Where the beginning was left out: at what the end of the answer and the rendering have in common, or a
            # little later, since what was left out may end like what stands before.
            stop = self._probe(turns, index, text, source, behind=True)
            content = whole.rstrip() if not text[:stop].endswith(whole[-1:]) else whole
            pairs = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(content[::-1], text[stop - 1 :: -1], strict=False)
            )
            common = len(content) - sum(1 for _ in pairs)
            places += range(common, min(common + LONGEST_COMMON_END, len(content)))
        for place in places:
            changed = Message(turns[index].role, whole[:place] + PROBE + whole[place:])
            probed, _ = self._render([*turns[:index], changed, *turns[index + 1 :]], source)
            head, probe, tail = probed.partition(PROBE)
            at = len(text) - len(tail) if behind else len(head)
            # Templates that trim find nothing to trim before the probe, or behind it.
            same_head, same_tail = text[:at].rstrip() == head.rstrip(), text[at:].lstrip() == tail.lstrip()
            if probe and PROBE not in tail and same_head and same_tail:
                return at
        raise DataError(
            f"{source}: the chat template rewrites turn {index + 1}, so its answer can't be told from the rest; "
            f"use a template with generation marks, {SKIP}"
        )

    def _render_with_marks(
        self, turns: Sequence[Message], answers: list[int], turn_ends: tuple[str, ...], source: str
    ) -> Rendered:
        text, marks = self._render(turns, source, marks=True)
        marks = [(begin, begin + len(text[begin:stop].rstrip())) for begin, stop in marks if text[begin:stop].strip()]
        spans = [(begin, stop) for begin, stop in marks if self._tokens.fullmatch(text[begin:stop])]
        marks = [mark for mark in marks if mark not in spans]  # of those, it has to be said whose answer they are
        number, shortened, reached = 0, 0, False
        for order, (begin, stop) in enumerate(marks):
            marked = text[begin:stop]
            # A mark for each answer is the rule; a template may also mark the last one only, or one in two parts.
            numbers = [order] if len(marks) == len(answers) else range(number, len(answers))
            fitting = (n for n in numbers if _is_marked_answer(marked, turns[answers[n]].content, turn_ends[n]))
            number = next(fitting, -1)
            if number < 0:
                raise DataError(
                    f"{source}: the chat template marks {marked[:40]!r} as generated, which is in no answer; "
                    f"correct its generation marks, {SKIP}"
                )
            turn_end, last = turn_ends[number], number == len(answers) - 1
            shortened += turns[answers[number]].content.strip() not in marked
            reached |= last
            answer_stop = self._turn_end_start(text, begin, stop, turn_end)
            spans.append((begin, max(stop, self._past_turn_end(text, answer_stop, turn_end, last, source))))
        return Rendered(text, spans, self.is_token(turn_ends[-1]) or not reached, shortened)

    def _turn_end_start(self, text: str, begin: int, stop: int, turn_end: str) -> int:
        """Where what is marked goes over into what ends the turn: at its end, or before one of its last tokens."""
        run = re.search(rf"{self._tokens.pattern}$", text[begin:stop])
        tokens = self._token.finditer(text, begin + run.start(), stop) if run else ()
        places = [stop, *(match.start() for match in tokens)]
        return next((at for at in places if re.compile(rf"\s*{re.escape(turn_end)}").match(text, at)), stop)

    def _render_or_empty(self, turns: Sequence[Message], *, prompt: bool) -> str:
        """A rendering, or nothing where the template refuses it or there is no turn to render."""
        try:
            return self._render(turns, "", prompt=prompt)[0] if turns else ""
        except DataError:
            return ""

    def _render(
        self, turns: Sequence[Message], source: str, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._content_as_parts:
            chat = [{"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in turns]
        else:
            chat = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            with _bounded_memory():
                texts, found = render_jinja_template(
                    [chat],
                    chat_template=self.text,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=marks,
                    **self._names,
                )
        except MemoryError as error:
            raise DataError(
                f"{source}: the chat template takes more than {RENDER_BYTES / 2**30:g} GiB of memory; correct it, or "
                "take another one: data.chat_template=chatml"
            ) from error
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"{source}: the chat template refuses it ({reason}); the turns are "
                f"{', '.join(turn.role for turn in turns)}; correct the row, {SKIP}"
            ) from error
        return texts[0], [(begin, stop) for begin, stop in found[0]] if found else []


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Taking more than `RENDER_BYTES` is a MemoryError, on systems that say how much is taken already."""
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    import resource

    with _limited:
        before, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = int(status.read_bytes().split()[0]) * resource.getpagesize() + RENDER_BYTES
        limits = [each for each in (before, most) if each != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([limit, *limits]), most))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (before, most))


def _template_text(tokenizer: Any, name: str) -> str:
    if name in BUILT_IN_TEMPLATES:
        end = "'<|im_end|>'" if "<|im_end|>" in tokenizer.get_vocab() or not tokenizer.eos_token else "eos_token"
        return BUILT_IN_TEMPLATES[name].replace("END", end)
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name in named or (not name and named):
        if not name and "default" not in named:
            raise DataError(
                f"the tokenizer has several chat templates and none is called default ({', '.join(sorted(named))}); "
                f"name one: {setting('data.chat_template', min(named))}"
            )
        return str(named[name or "default"])
    if name and "{" not in name:
        return _read_template(name, (*BUILT_IN_TEMPLATES, *sorted(named)))
    return name or tokenizer.chat_template or ""


def _read_template(path: str, others: Sequence[str]) -> str:
    try:
        return read_text(Path(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"there is no chat template {path}; there are {', '.join(others)}, a file is read as UTF-8 "
            f"({getattr(error, 'strerror', None) or error}), empty takes the tokenizer's own: data.chat_template=chatml"
        ) from error


def _is_marked_answer(marked: str, content: str, turn_end: str) -> bool:
    """Whether marked characters are an answer's: its last words are among them, or they are among its words."""
    bare = marked.removesuffix(turn_end).strip() or marked.strip()
    return content.strip().rsplit("\n", 1)[-1][-40:] in marked or bare in content
