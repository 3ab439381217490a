"""Masks, compared with what a person would mark by hand, for templates after those of well-known models."""

import pickle
import resource
import sys
import threading

import numpy as np
import pytest

from finetune.data.text import template
from finetune.data.text.formats import Conversation, Message
from finetune.data.text.tokens import Chat, preview_row, token_spans
from finetune.errors import DataError
from tests import chat_templates as templates
from tests.chat_templates import tokenizer

TWO = (("user", "What is the colour of the sky?"), ("assistant", "It is blue."),
       ("user", "And the sea?"), ("assistant", "The sea is green. 🦜"))  # fmt: skip
SYSTEM = ("system", "Answer like a pirate.")
THOUGHT = (("user", "hi!"), ("assistant", "<think>Let me see.</think>\n\nHello there"), *TWO)


def row(*turns):
    return Conversation(tuple(Message(*turn) for turn in turns), "data.jsonl:7")


def spans(tokenizer_, encoded):
    """The trained pieces of text."""
    return [part.split("⟧")[0] for part in preview_row(tokenizer_, encoded).split("⟦")[1:]]


def encode(name, *turns, **options):
    made = tokenizer(getattr(templates, name), **options)
    return made, Chat(made).encode(row(*turns))


@pytest.mark.parametrize("metaspace", [False, True], ids=["byte-level", "metaspace"])
@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("LLAMA3", "{}<|eot_id|>", "{}<|eot_id|>"),
        ("CHATML", "{}<|im_end|>", "{}<|im_end|>"),
        ("CHATML_MARKED", "{}<|im_end|>", "{}<|im_end|>"),
        ("CHATML_MARKED_WHOLE", "{}<|im_end|>", "{}<|im_end|>"),
        ("QWEN3", "{}<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>"),
        ("R1", "{}</s>", "{}</s>"),
        ("MISTRAL", " {}</s>", " {}</s>"),
        ("LLAMA2", " {} </s>", " {} </s>"),
        ("GEMMA", "{}<end_of_turn>", "{}<end_of_turn>"),
        ("PHI", "{}<|end|>", "{}<|end|>\n</s>"),
        ("GLM", "\n{}<|user|>", "\n{}</s>"),
        ("ZEPHYR", "{}</s>", "{}</s>"),
        ("LETTERS", "{}", "{}\n\n</s>"),
        ("NO_PROMPT", "{}<|im_end|>", "{}<|im_end|>"),
    ],
)  # fmt: skip
def test_exactly_the_answers_and_their_ends_are_trained(name, first, last, metaspace):
    made, encoded = encode(name, *TWO, metaspace=metaspace, unk="<unk>" if metaspace else None)
    wanted = [first.format("It is blue."), last.format("The sea is green. 🦜")]
    found = spans(made, encoded)
    if metaspace:  # its decoder drops a space in front
        wanted, found = [text.lstrip(" ") for text in wanted], [text.lstrip(" ") for text in found]
    assert found == wanted
    assert encoded.ids.dtype == np.uint32
    assert encoded.trained.dtype == np.bool_
    own = made.apply_chat_template([{"role": role, "content": text} for role, text in TWO])["input_ids"]
    ends = [made.eos_token_id] if name in ("GLM", "LETTERS") else []
    assert encoded.ids.tolist() == own + ends, "the ids are the tokenizer's own"


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("name", ["CHATML", "CHATML_MARKED", "CHATML_MARKED_WHOLE"])
def test_white_space_of_answers_stays(name, trim):
    text = "  \n  one\n\n\n    two \n "
    made, encoded = encode(name, ("user", "hi!"), ("assistant", text), trim=trim)
    assert spans(made, encoded) == [text + "<|im_end|>"]
    made, encoded = encode("LLAMA3", ("user", "hi!"), ("assistant", text), trim=trim)
    assert spans(made, encoded) == ["one\n\n\n    two<|eot_id|>"], "Llama 3 trims"


@pytest.mark.parametrize("name", ["CHATML", "QWEN3", "R1", "PHI", "GLM", "LLAMA3", "ZEPHYR", "MISTRAL", "GEMMA"])
def test_answers_that_look_like_their_surroundings(name):
    turns = [("user", "a"), ("assistant", "a"), ("user", "user"), ("assistant", "assistant"), ("user", "model"),
             ("assistant", "user\nassistant"), ("user", "?"), ("assistant", "t")]  # fmt: skip
    made, encoded = encode(name, *turns)
    answers = [text for role, text in turns if role == "assistant"]
    found = spans(made, encoded)
    assert len(found) == len(answers)
    assert all(answer in text for answer, text in zip(answers, found, strict=True))
    assert all(len(text) < len(answer) + 35 for answer, text in zip(answers, found, strict=True))


def test_a_default_system_turn_is_not_trained_and_an_own_one_replaces_it():
    made, encoded = encode("CHATML", *TWO)
    assert preview_row(made, encoded).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user"
    )
    made, encoded = encode("CHATML", SYSTEM, *TWO)
    assert preview_row(made, encoded).startswith(
        "<|im_start|>system\nAnswer like a pirate.<|im_end|>\n<|im_start|>user"
    )
    made, encoded = encode("LLAMA2", SYSTEM, *TWO)
    assert spans(made, encoded) == [" It is blue. </s>", " The sea is green. 🦜 </s>"]


def test_dropped_thoughts_are_not_trained_and_are_counted():
    made, encoded = encode("QWEN3", *THOUGHT)
    assert spans(made, encoded)[0] == "Hello there<|im_end|>"
    assert encoded.shortened == 1
    made, encoded = encode("QWEN3", *THOUGHT[:2])
    assert spans(made, encoded) == ["<think>\nLet me see.\n</think>\n\nHello there<|im_end|>"]
    # Behind a prompt that opens a thought nothing of this begins; what is left of the answers is found all the same,
    # although "</think>" ends like the heading before them.
    made, encoded = encode("R1", *THOUGHT)
    assert spans(made, encoded) == ["\n\nHello there</s>", "It is blue.</s>", "The sea is green. 🦜</s>"]
    assert encoded.shortened == 1


def test_tokens_across_a_border_go_with_the_answer():
    glued = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    made = tokenizer(glued + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    encoded = Chat(made).encode(row(("user", "hi!"), ("assistant", "Hello there")))
    assert spans(made, encoded) == [" Hello there</s>"], "the space belongs to the token ' Hello'"


def test_a_control_token_that_swallows_white_space_stays_untrained():
    from tokenizers import AddedToken

    made = tokenizer(templates.PHI)
    made.add_special_tokens({"additional_special_tokens": [AddedToken("<|assistant|>", rstrip=True, special=True)]})
    encoded = Chat(made).encode(row(("user", "hi!"), ("assistant", " Hello there")))
    assert spans(made, encoded) == ["Hello there<|end|>\n</s>"]


def test_what_follows_the_last_answer_is_left_out():
    made, encoded = encode("CHATML", *TWO[:3])
    assert preview_row(made, encoded).endswith("⟦It is blue.<|im_end|>⟧\n")


def test_an_answer_may_come_first_and_tools_may_speak():
    made, encoded = encode("CHATML", ("assistant", "Hello there"), ("tool", "four"), ("assistant", "bye"))
    assert spans(made, encoded) == ["Hello there<|im_end|>", "bye<|im_end|>"]


@pytest.mark.parametrize("name", ["CHATML", "CHATML_MARKED", "GLM"])
def test_answers_of_weight_0_are_context(name):
    turns = [TWO[0], (*TWO[1], False), *TWO[2:]]
    made, encoded = encode(name, *turns)
    assert len(spans(made, encoded)) == 1
    assert "The sea is green" in spans(made, encoded)[0]
    made, encoded = encode(name, *TWO[:3], (*TWO[3], False))
    assert len(spans(made, encoded)) == 1
    assert "It is blue." in spans(made, encoded)[0]
    assert encoded.ids[-1] != made.eos_token_id
    with pytest.raises(DataError, match=r'data.jsonl:7: has no trained token \(every answer has "weight": 0'):
        encode(name, TWO[0], (*TWO[1], False))


MARK, UNMARK = "{% generation %}", "{% endgeneration %}"
BODY = "{{ message['content'] }}"


def test_marks_equal_those_of_transformers_but_for_the_end():
    two = [(role, text.replace("🦜", "!")) for role, text in TWO]  # of its bytes transformers takes the first only
    made, encoded = encode("CHATML_MARKED", *two)
    turns = [{"role": role, "content": text} for role, text in two]
    own = made.apply_chat_template(turns, return_assistant_tokens_mask=True)
    ends = (encoded.ids == made.convert_tokens_to_ids("<|im_end|>")) & encoded.trained
    assert ends.sum() == 2
    assert (encoded.trained & ~ends).astype(int).tolist() == own["assistant_masks"]


def test_several_tokens_may_end_a_turn():
    two = templates.CHATML.replace("<|im_end|>\n", "<|im_end|><|end|>")
    made = tokenizer(two)
    assert spans(made, Chat(made).encode(row(*TWO))) == [
        "It is blue.<|im_end|><|end|>", "The sea is green. 🦜<|im_end|><|end|>"
    ]  # fmt: skip
    assert made.convert_ids_to_tokens(list(Chat(made).stop_ids())) == ["<|end|>", "</s>"]


def test_templates_that_want_lists_of_parts():
    parts = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    made = tokenizer(parts)
    assert spans(made, Chat(made).encode(row(*TWO))) == ["It is blue.<|im_end|>", "The sea is green. 🦜<|im_end|>"]


def test_marks_of_the_end_alone_count_too():
    for end in ("<|im_end|>", "<|end|><|im_end|>"):
        made = tokenizer(templates.CHATML_MARKED.replace("{{ '<|im_end|>\n' }}", f"{MARK}{end}{UNMARK}{{{{ '\n' }}}}"))
        text = preview_row(made, Chat(made).encode(row(*TWO)))
        assert text.endswith(f"⟦The sea is green. 🦜{end}⟧\n")


def test_marks_that_hold_a_part_of_what_ends_the_turn():
    text = templates.CHATML_MARKED_WHOLE.replace(
        "<|im_end|>\n' }}{% endgen", "<|end|>' }}{% endgeneration %}{{ '</s>\n' }}#"
    )
    text = text.replace("#eration %}", "").replace("<|im_end|>", "<|end|></s>")
    made = tokenizer(text)
    assert spans(made, Chat(made).encode(row(*TWO)))[0] == "It is blue.<|end|></s>"


def test_marks_of_the_last_answer_only_or_in_parts():
    last = templates.CHATML_MARKED.replace(
        "message['role'] == 'assistant'", "message['role'] == 'assistant' and loop.last"
    )
    made = tokenizer(last)
    assert spans(made, Chat(made).encode(row(*TWO))) == ["The sea is green. 🦜<|im_end|>"]
    parts = templates.CHATML_MARKED.replace(
        MARK + BODY + UNMARK,
        f"{MARK}{{{{ message['content'][:4] }}}}{UNMARK}{MARK}{{{{ message['content'][4:] }}}}{UNMARK}",
    )
    made = tokenizer(parts)
    with pytest.raises(DataError, match=r"ends other answers with '<\|im_end\|>', but behind this one stands 's blue"):
        Chat(made).encode(row(*TWO))


def test_empty_and_misplaced_marks_are_errors():
    empty = templates.CHATML_MARKED.replace(MARK + BODY + UNMARK, f"{MARK}{UNMARK}{BODY}")
    with pytest.raises(DataError, match=r"data.jsonl:7: has no trained token .*generation marks hold nothing"):
        Chat(tokenizer(empty)).encode(row(*TWO))
    users = templates.CHATML_MARKED.replace("== 'assistant' %}{% gen", "== 'user' %}{% gen")
    with pytest.raises(DataError, match=r"marks 'What is the colour of the sky\?' as generated, which is in no answer"):
        Chat(tokenizer(users)).encode(row(*TWO))
    # Text that a macro writes before the mark is not counted by transformers: its mask would be shifted.
    macro = (
        "{% macro show(message) %}{{ '<|im_start|>assistant and more\n' }}{% generation %}{{ message.content }}"
        "{% endgeneration %}{% endmacro %}{% for message in messages %}{% if message.role == 'assistant' %}"
        "{{ show(message) }}{% else %}{{ '<|im_start|>user\n' + message.content }}{% endif %}{{ '<|im_end|>' }}"
        "{% endfor %}"
    )
    with pytest.raises(DataError, match=r"as generated, which is in no answer; correct its generation marks"):
        Chat(tokenizer(macro)).encode(row(*TWO))


def test_an_end_spelled_in_letters_is_trained_and_an_end_token_follows():
    spelled = templates.CHATML.replace("<|im_end|>", "[end]")
    made = tokenizer(spelled)
    assert spans(made, Chat(made).encode(row(*TWO))) == ["It is blue.[end]", "The sea is green. 🦜[end]\n</s>"]


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("LAST_TWO", TWO, r"^data.jsonl:7: the chat template leaves out or rewrites turn 1 \(user\).*=chatml"),
        ("NO_SYSTEM", (SYSTEM, *TWO), r"leaves out or rewrites turn 1 \(system\)"),
        ("SHOUTING", TWO, r"leaves out or rewrites turn 1 \(user\)"),
        ("COUNTING", TWO, r"^data.jsonl:7: the chat template rewrites turn 2.*skip_bad"),
        ("MISTRAL", (SYSTEM, *TWO), r"^data.jsonl:7: the chat template refuses it \(Conversation roles must alternate"),
        ("MISTRAL", (*TWO[:2], *TWO[1:]), r"refuses it .*; the turns are user, assistant, assistant, user, assistant;"),
        ("GEMMA", (SYSTEM, *TWO), r"refuses it \(System role not supported\)"),
    ],
)  # fmt: skip
def test_templates_that_do_not_fit_the_row_are_errors_that_name_it(name, turns, message):
    with pytest.raises(DataError, match=message) as caught:
        encode(name, *turns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", ["{{ messages[9]['content'] }}", "{{ 1 / 0 }}", "{% if %}", "{{ nothing.x.y }}"])
def test_templates_that_raise_whatever(broken):
    with pytest.raises(DataError, match=r"^data.jsonl:7: the chat template refuses it \(."):
        Chat(tokenizer(broken)).encode(row(*TWO))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems don't say how much memory is taken")
@pytest.mark.parametrize(
    "endless",
    [
        "{{ 'x' * 3000000000 }}",
        "{% set n = namespace(x='x' * 3000) %}{% for i in range(30) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ],
)
def test_a_template_that_takes_memory_without_end_is_stopped(endless, monkeypatch):
    monkeypatch.setattr(template, "RENDER_BYTES", 2**27)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(DataError, match=r"^data.jsonl:7: .* takes more than 0.125 GiB.*template=chatml"):
        Chat(tokenizer(endless)).encode(row(*TWO))
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_the_limit_on_memory_ends_with_the_last_of_several_threads():
    limits = resource.getrlimit(resource.RLIMIT_AS)
    entered, leave = threading.Event(), threading.Event()

    def render():
        with template._bounded_memory():
            entered.set()
            leave.wait()

    other = threading.Thread(target=render)
    with template._bounded_memory():
        other.start()
        entered.wait(0.2)  # where both were inside, the first to leave took the other's limit back
    leave.set()
    other.join()
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_an_end_that_depends_on_the_text_is_an_error():
    odd = templates.CHATML.replace(
        "+ '<|im_end|>\n'", "+ ('' if 'blue' in message['content'] else '<|im_end|>') + '\n'"
    )
    with pytest.raises(
        DataError, match=r"ends other answers with '<\|im_end\|>', but behind this one stands '\\n<\|im_st"
    ):
        Chat(tokenizer(odd)).encode(row(*TWO))


def test_no_double_start_token():
    for name in ("LLAMA3", "TWICE", "GEMMA"):
        made, encoded = encode(name, *TWO)
        assert (encoded.ids == made.bos_token_id).sum() == 1
        assert encoded.ids[0] == made.bos_token_id


def test_plain_text_is_trained_whole_and_ends():
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    encoded = Chat(made).encode(row(("text", "Hello there")))
    assert made.decode(encoded.ids) == "Hello there</s>"
    assert encoded.trained.tolist() == [False] + [True] * (len(encoded.ids) - 1), "nothing predicts the first token"
    for single in ("<s> $0", "<s> $0 </s>"):
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        for text in ("Hello there", "<s>Hello there"):
            encoded = Chat(made).encode(row(("text", text)))
            assert made.decode(encoded.ids) == "<s>Hello there</s>"
            assert encoded.trained.tolist() == [False] + [True] * (len(encoded.ids) - 1)


def test_without_end_token_nothing_would_stop():
    made = tokenizer(templates.GLM, eos=None)
    for turns in (TWO, [("text", "Hello")]):
        with pytest.raises(DataError, match=r"data.jsonl:7: neither template nor tokenizer has an end token.*chatml"):
            Chat(made).encode(row(*turns))
    with pytest.raises(DataError, match=r"no trained token"):
        Chat(tokenizer()).encode(row(("text", "")))


def test_no_template_says_what_to_type_and_chatml_is_built_in():
    made = tokenizer()
    with pytest.raises(DataError, match=r"the tokenizer has no chat template; .*data.chat_template=chatml"):
        Chat(made).encode(row(*TWO))
    with pytest.raises(
        DataError,
        match=r"there is no chat template alpaca; there are chatml, .* empty takes.*data.chat_template=chatml",
    ):
        Chat(made, template="alpaca")
    encoded = Chat(made, template="chatml").encode(row(SYSTEM, *TWO))
    assert spans(made, encoded) == ["It is blue.<|im_end|>", "The sea is green. 🦜<|im_end|>"]
    bare = tokenizer(special=["<s>", "</s>"])
    assert spans(bare, Chat(bare, template="chatml").encode(row(*TWO)))[0] == "It is blue.</s>", "a token it has"
    assert spans(made, Chat(made, template=templates.ZEPHYR).encode(row(*TWO)))[0] == "It is blue.</s>"


def test_what_a_sampler_must_stop_at():
    def spelled(name):
        made = tokenizer(getattr(templates, name))
        return made.convert_ids_to_tokens(list(Chat(made).stop_ids()))

    assert spelled("LLAMA3") == ["<|eot_id|>", "</s>"]
    assert spelled("GLM") == ["<|user|>", "</s>"]
    assert spelled("ZEPHYR") == ["</s>"]
    assert Chat(tokenizer()).stop_ids() == (1,)
    with pytest.raises(DataError, match="the chat template: neither"):
        Chat(tokenizer(eos=None)).stop_ids()


@pytest.mark.parametrize("metaspace", [False, True], ids=["byte-level", "metaspace"])
@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("LLAMA3", "<|end_header_id|>\n\n"),
        ("CHATML", "<|im_start|>assistant\n"),
        ("CHATML_MARKED", "<|im_start|>assistant\n"),
        ("QWEN3", "<|im_start|>assistant\n"),
        ("R1", "<|assistant|><think>\n"),
        ("MISTRAL", "[/INST]"),
        ("GEMMA", "<start_of_turn>model\n"),
        ("GLM", "<|assistant|>"),
        ("ZEPHYR", "<|assistant|>\n"),
        ("TWICE", "<|end_header_id|>\n\n"),
    ],
)
def test_a_prompt_is_the_templates_own_call_for_an_answer(name, tail, metaspace):
    made = tokenizer(getattr(templates, name), metaspace=metaspace, unk="<unk>" if metaspace else None)
    ids = Chat(made).prompt_ids("What is the colour of the sky?")
    turn = [{"role": "user", "content": "What is the colour of the sky?"}]
    own = made.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert ids == (own[1:] if name == "TWICE" else own)
    assert made.decode(ids).endswith(tail)


@pytest.mark.parametrize("name", ["LLAMA3", "CHATML", "CHATML_MARKED_WHOLE", "QWEN3", "MISTRAL", "NO_PROMPT", "TWICE"])
def test_an_answer_is_trained_behind_what_its_prompt_will_be(name):
    made, encoded = encode(name, *TWO[:2])
    prompt = Chat(made).prompt_ids(TWO[0][1])
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert encoded.trained[len(prompt)]
    assert not encoded.trained[: len(prompt)].any()


def test_prompts_of_templates_that_want_lists_of_parts():
    parts = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% for part in message.content %}"
        "{{ part.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    made = tokenizer(parts)
    spelled = made.decode(Chat(made).prompt_ids("Hello there"))
    assert spelled == "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_template_a_prompt_is_text_to_be_continued():
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    assert made.decode(Chat(made).prompt_ids("Hello there")) == "Hello there"
    with pytest.raises(DataError, match=r"sample.prompts: '' holds no token of this tokenizer; write at least a word"):
        Chat(made).prompt_ids("")
    for single in ("<s> $0", "<s> $0 </s>"):
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        assert made.decode(Chat(made).prompt_ids("<s>Hello there")) == "<s>Hello there", "neither two starts nor an end"


def test_prompts_that_the_template_refuses_are_named():
    with pytest.raises(DataError, match=r"^sample.prompts: the chat template leaves out or rewrites turn 1 \(user\)"):
        Chat(tokenizer(templates.SHOUTING)).prompt_ids("hi!")
    with pytest.raises(DataError, match=r"^sample.prompts: 'hi\\ud83d' has half a character"):
        Chat(tokenizer(templates.CHATML)).prompt_ids("hi\ud83d")


def test_control_tokens_in_texts_are_counted():
    _, encoded = encode("CHATML", ("user", "<s>struck</s>"), ("assistant", "It is blue."))
    assert encoded.control == 2


def test_many_at_once_equal_one_by_one_and_bad_rows_keep_their_place():
    made = tokenizer(templates.MISTRAL)
    chat = Chat(made)
    rows = [row(*TWO), row(SYSTEM, *TWO), row(("text", "Hello")), row(*TWO[:2])]
    found = chat.encode_batch(rows)
    assert isinstance(found[1], DataError)
    for index in (0, 2, 3):
        alone = chat.encode(rows[index])
        assert alone.ids.tolist() == found[index].ids.tolist()
        assert alone.trained.tolist() == found[index].trained.tolist()
    again = pickle.loads(pickle.dumps(chat))
    assert again.content_hash == chat.content_hash
    assert again.encode(rows[0]).ids.tolist() == found[0].ids.tolist()


def test_marked_shows_all_of_a_row():
    made, encoded = encode("CHATML", *TWO)
    text = preview_row(made, encoded)
    assert text.replace("⟦", "").replace("⟧", "") == made.decode(encoded.ids)
    assert text.count("⟦") == 2


BARE = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def test_identity_is_by_content(tmp_path):
    from transformers import AutoTokenizer

    made = tokenizer(templates.CHATML)
    made.save_pretrained(tmp_path / "a")
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    again(["a", "b b b b"], padding=True, truncation=True, max_length=3) if again.pad_token else None
    assert Chat(again).content_hash == Chat(made).content_hash
    others = [Chat(tokenizer(templates.PHI)), Chat(tokenizer(templates.CHATML, eos="<|im_end|>")),
              Chat(tokenizer(templates.CHATML, special=BARE)), Chat(made, template="chatml")]  # fmt: skip
    assert len({chat.content_hash for chat in [*others, Chat(made)]}) == 5


class Letters:
    """As much of a tokenizer written in Python as is used: one id per character, without offsets."""

    is_fast = False
    bos_token, eos_token, bos_token_id, eos_token_id = "<s>", "$", None, ord("$")
    special_tokens_map = {"eos_token": "$"}  # noqa: RUF012
    all_special_tokens = ("$",)
    added_tokens_decoder = {}  # noqa: RUF012
    chat_template = templates.ZEPHYR

    def get_chat_template(self):
        return self.chat_template

    def get_vocab(self):
        return {chr(code): code for code in range(256)}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def test_tokenizers_without_offsets_are_given_text_in_pieces():
    letters = Letters()
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    encoded = Chat(letters).encode(Conversation(turns, "f:1"))
    assert preview_row(letters, encoded) == "<|user|>\na$\n<|assistant|>\n⟦b$⟧\n<|user|>\nc$\n<|assistant|>\n⟦d$⟧\n"
    assert len(Chat(letters).content_hash) == 64
    [(ids, trained)] = token_spans(letters, ["abcdefgh"], [[(4, 6), (1, 3), (2, 4), (7, 8)]])
    assert (ids.tolist(), trained.astype(int).tolist()) == (list(b"abcdefgh"), [0, 1, 1, 1, 1, 1, 0, 1])
    [(_, trained)] = token_spans(letters, ["ab"], [[(0, 1)]])
    assert trained.tolist() == [True, False]


def test_no_text_no_tokens():
    assert token_spans(tokenizer(), [], []) == []
    [(ids, trained)] = token_spans(tokenizer(), [""], [[(0, 0)]])
    assert ids.dtype == np.uint32
    assert len(ids) == len(trained) == 0


def test_a_template_may_be_a_file(tmp_path):
    made = tokenizer(templates.CHATML)
    file = tmp_path / "own.jinja"
    file.write_text(templates.ZEPHYR, encoding="utf-8")
    assert Chat(made, template=str(file)).content_hash == Chat(made, template=templates.ZEPHYR).content_hash
    file.write_bytes(b"\xff")
    for odd in (str(file), str(tmp_path), str(tmp_path / "gone.jinja")):
        with pytest.raises(DataError, match=r"there is no chat template .*data.chat_template=chatml"):
            Chat(made, template=odd)


def test_one_of_several_templates_is_named():
    made = tokenizer(templates.CHATML)
    made.chat_template = {"rag": templates.ZEPHYR, "tool_use": templates.LLAMA3}
    with pytest.raises(DataError, match=r"none is called default \(rag, tool_use\); name one: data.chat_template=rag"):
        Chat(made)
    assert Chat(made, template="rag").template.text == templates.ZEPHYR
    made.chat_template = {"default": templates.CHATML, "rag": templates.ZEPHYR}
    assert Chat(made).template.text == templates.CHATML
