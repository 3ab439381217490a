"""The conversations about the toy world, the two voices, and what makes a language model's rows of them."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from scripts.embedded.language import export, new_model
from scripts.embedded.language_evaluate import answer, answer_figures, last_answers
from scripts.embedded.language_text import END, IGNORED, ROLES, START, attended, pack, tokenise, train_tokenizer
from scripts.toytalk.__main__ import CONVERSATIONS, pirate_records, write_dataset
from scripts.toytalk.compose import PIRATE_SEEDS, held_out_questions, sample_conversation, training_conversations
from scripts.toytalk.conversation import Conversation, Turn, held_out, key_held_out
from scripts.toytalk.instructions import free_word
from scripts.toytalk.manners import asked_in_manner, in_manner, sample_manner, with_manners
from scripts.toytalk.scoring import exactly_right, fact_right
from scripts.toytalk.voice import is_pirate, neutral, pirate
from scripts.toytalk.words import COLOURS, KINDS, NAMES, SETTINGS
from scripts.toyworld import scene

SHIPPED = Path(__file__).parents[3] / "datasets" / "pirate_chat"
SAMPLED = [sample_conversation(seed) for seed in range(4000)]
TURNS = [turn for conversation in SAMPLED for turn in conversation.turns]


# --- conversations ----------------------------------------------------------------------------------------------


def test_a_seed_names_one_conversation() -> None:
    assert SAMPLED[:200] == [sample_conversation(seed) for seed in range(200)]
    assert len({conversation.turns[0].question for conversation in SAMPLED}) > 3000


def test_every_skill_is_asked_often_enough_to_be_learnt() -> None:
    asked = Counter(turn.skill for turn in TURNS)
    assert len(asked) == 40
    assert min(asked.values()) > len(TURNS) // 1000


def test_training_never_sees_a_held_out_fact() -> None:
    trained = [turn for conversation in training_conversations(0, 4000) for turn in conversation.turns]
    asked = [question.turn for question in held_out_questions(1000)]
    assert not any(held_out(turn) for turn in trained)
    assert all(held_out(turn) for turn in asked)
    assert not {key for turn in trained for key in turn.keys} & {
        key for turn in asked for key in turn.keys if key_held_out(key)
    }
    seen = sum(not held_out(conversation) for conversation in SAMPLED)
    assert 0.6 < seen / len(SAMPLED) < 0.9


def test_scenes_and_pictures_are_split_alike() -> None:
    for kind in KINDS:
        for colour in COLOURS:
            for setting in SETTINGS:
                picture = scene.Scene((scene.Thing(kind, colour, "big", "left"),), setting, 0)
                assert key_held_out(f"{kind}|{colour}|{setting}") == scene.held_out(picture)


def test_a_question_comes_with_the_right_answers_before_it() -> None:
    conversation = next(item for item in SAMPLED if len(item.turns) == 3 and item.system)
    last = conversation.questions()[-1]
    assert [message["role"] for message in last.messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert last.messages == conversation.messages[:-1]
    assert last.turn.answer == conversation.messages[-1]["content"]


@pytest.mark.parametrize("skill", ["add", "subtract", "multiply"])
def test_sums_are_right(skill: str) -> None:
    operations = {"add": int.__add__, "subtract": int.__sub__, "multiply": int.__mul__}
    for turn in TURNS:
        if turn.skill == skill:
            first, _, second, _, result = turn.answer.rstrip(".").split()
            assert operations[skill](int(first), int(second)) == int(result)


# --- voices and facts -------------------------------------------------------------------------------------------


def test_the_reader_tells_plain_from_pirate_without_a_mistake() -> None:
    assert len(TURNS) > 7000
    assert [turn.answer for turn in TURNS if is_pirate(turn.answer)] == []
    assert [turn.answer for turn in TURNS if not is_pirate(pirate(turn.answer))] == []


def test_the_pirate_keeps_every_fact() -> None:
    assert [turn.answer for turn in TURNS if not fact_right(turn, turn.answer)] == []
    assert [pirate(turn.answer) for turn in TURNS if not fact_right(turn, pirate(turn.answer))] == []


def test_the_pirate_is_varied_and_steady() -> None:
    spoken = [pirate(f"The {kind} is {colour}.") for kind in KINDS for colour in COLOURS]
    assert spoken == [pirate(f"The {kind} is {colour}.") for kind in KINDS for colour in COLOURS]
    assert len({text.split()[0] for text in spoken}) >= 4
    assert len({text.split()[-1] for text in spoken}) >= 4


@pytest.mark.parametrize("text", ["There be two cups.", "Aye, it is red.", "Arrr!", "AHOY there", "It is red, matey"])
def test_marks_of_a_pirate(text: str) -> None:
    assert is_pirate(text)


@pytest.mark.parametrize("text", ["", "Yes, the arrow is red.", "A bee is on the carrot.", "Yesterday, mate."])
def test_no_marks_of_a_pirate(text: str) -> None:
    assert not is_pirate(text)


def test_capitals_open_a_sentence_or_a_name() -> None:
    for turn in TURNS:
        opening, comma, rest = pirate(turn.answer).partition(", ")
        if comma and opening in ("Arr", "Yarr", "Avast", "Shiver me timbers") and turn.skill != "introduce":
            first = rest.split()[0].strip(",!.")
            assert not first[0].isupper() or first == "I" or first in NAMES, pirate(turn.answer)


def test_a_manner_is_described_first_and_keeps_numbers_and_things() -> None:
    rng = random.Random(0)
    for conversation in SAMPLED[:500]:
        manner = sample_manner(rng)
        spoken = in_manner(conversation, manner)
        assert spoken.system == manner.described
        for plain, turn in zip(conversation.turns, spoken.turns, strict=True):
            assert turn.answer.startswith(manner.opening)
            assert manner.closing in turn.answer
            assert not is_pirate(turn.answer)
            if not {"yes", "no", "hello"} & {word.lower() for word in plain.words}:
                assert fact_right(plain, turn.answer), (manner, turn.answer)


def test_a_question_in_a_manner_comes_with_answers_in_it() -> None:
    manner = sample_manner(random.Random(1))
    for conversation in SAMPLED[:100]:
        asked = [asked_in_manner(question, manner) for question in conversation.questions()]
        assert asked == in_manner(conversation, manner).questions()


def test_a_share_of_the_training_is_in_manners() -> None:
    spoken = list(with_manners(SAMPLED, 7))
    assert spoken == list(with_manners(SAMPLED, 7))
    changed = sum(said != plain for said, plain in zip(spoken, SAMPLED, strict=True))
    assert 0.65 < changed / len(SAMPLED) < 0.75


def test_words_to_repeat_belong_to_neither_voice() -> None:
    rng = random.Random("words")
    assert not any(is_pirate(free_word(rng)) for _ in range(3000))
    assert not any(map(neutral, ("is", "Are", "me", "timbers", "matey", "Aye", "you")))


RED = Turn("What colour is the robot?", "The robot is red.", "colour", ("red",))
TWO = Turn("How many cups are there?", "There are two cups.", "count", ("two",))
NO_CAT = Turn("Is there a cat?", "No, there is no cat.", "exists", ("no",))
SUM = Turn("What is 12 plus 7?", "12 plus 7 is 19.", "add", ("19",))
SORTED = Turn("Sort 5, 2 and 9.", "2, 5, 9.", "sort_numbers", ("2", "5", "9"), ordered=True)


@pytest.mark.parametrize(
    ("turn", "text", "right"),
    [
        (RED, "The robot is red.", True),
        (RED, "Arr, red it be, that robot, matey!", True),
        (RED, "The robot is blue.", False),
        (RED, "The robot is red and blue.", False),
        (RED, "The robot is reddish.", False),
        (RED, "", False),
        (TWO, "Arr, there be 2 cups!", True),
        (TWO, "There are three cups.", False),
        (TWO, "There are two or three cups.", False),
        (NO_CAT, "Nay, there be no cat, matey!", True),
        (NO_CAT, "Aye, there be a cat!", False),
        (SUM, "It be 19, matey!", True),
        (SUM, "12 plus 7 is 18.", False),
        (SUM, "12 plus 7 is 119.", False),
        (SORTED, "Arr, 2, 5 and 9!", True),
        (SORTED, "5, 2, 9.", False),
        (SORTED, "2, 5, 7, 9.", False),
    ],
)
def test_facts_are_read_in_either_voice(turn: Turn, text: str, right: bool) -> None:
    assert fact_right(turn, text) == right
    assert fact_right(json.loads(json.dumps(turn.fact)), text) == right


def test_word_for_word_means_just_that() -> None:
    assert exactly_right(RED, " The robot is red.\n")
    assert not exactly_right(RED, "the robot is red.")


# --- the data set -----------------------------------------------------------------------------------------------


def test_the_shipped_data_set_is_what_the_script_makes(tmp_path: Path) -> None:
    write_dataset(tmp_path, CONVERSATIONS)
    assert sorted(path.name for path in SHIPPED.iterdir()) == ["README.md", "conversations.jsonl"]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (SHIPPED / path.name).read_bytes()


def test_the_data_set_is_all_pirate_and_gives_no_held_out_question_away() -> None:
    records = [json.loads(line) for line in (SHIPPED / "conversations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == CONVERSATIONS == 200
    for record in records:
        spoken = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
        assert all(is_pirate(text) for text in spoken)
        assert all(fact_right(fact, text) for fact, text in zip(record["facts"], spoken, strict=True))
    asked = {json.dumps(question.messages) for question in held_out_questions(2000)}
    assert not asked & {json.dumps(record["messages"][:-1]) for record in records}
    assert not any(held_out(conversation) for conversation in training_conversations(PIRATE_SEEDS, 400))
    assert list(pirate_records(3)) == records[:3]


# --- tokenizer, template, rows ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """As users get it: saved and loaded again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(message["content"] for item in SAMPLED for message in item.messages).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["The robot is red.", "12 + 7 = 19", "Arr, matey!", " two  spaces\n", "日本 🦊 ÿ"])
def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_tokens_and_common_words_too(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 2048
    assert tokenizer.tokenize("198") == ["1", "9", "8"]
    assert len(tokenizer.tokenize("The robot is red.")) == 5


def test_the_marks_cover_just_what_the_assistant_says(tokenizer: PreTrainedTokenizerFast) -> None:
    for conversation, tokens in zip(
        SAMPLED[:300], tokenise(tokenizer, [item.messages for item in SAMPLED[:300]]), strict=True
    ):
        spoken = [token for token, mark in zip(tokens.ids, tokens.spoken, strict=True) if mark]
        assert tokenizer.decode(spoken) == "".join(turn.answer + END for turn in conversation.turns)
        before = [
            tokens.ids[index - 1] for index, mark in enumerate(tokens.spoken) if mark and not tokens.spoken[index - 1]
        ]
        assert tokenizer.convert_ids_to_tokens(before) == [ROLES["assistant"]] * len(conversation.turns)


def test_one_start_token_however_it_is_tokenised(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = next(item for item in SAMPLED if item.system).messages
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert text.startswith(START + ROLES["system"])
    assert tokenizer(text)["input_ids"] == ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert ids[-1] == tokenizer.eos_token_id


def test_a_prompt_is_the_beginning_of_the_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = SAMPLED[0].messages
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert whole == prompt + messages[-1]["content"] + END


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
    ],
)
def test_the_template_refuses_roles_it_does_not_know(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]
) -> None:
    with pytest.raises(TemplateError, match="system"):
        tokenizer.apply_chat_template(messages, tokenize=False)


def test_rows_hold_every_conversation_once_and_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = list(tokenise(tokenizer, [item.messages for item in SAMPLED[:200]]))
    rows = pack(examples, tokenizer.pad_token_id, open_rows=4)
    assert (rows.tokens == tokenizer.bos_token_id).sum() == len(examples)
    assert (rows.labels != IGNORED).sum() == sum(sum(example.spoken) for example in examples)
    assert (rows.tokens != tokenizer.pad_token_id).sum() == sum(len(example.ids) for example in examples)
    assert (rows.tokens != tokenizer.pad_token_id).float().mean() > 0.85
    assert len(pack(examples, tokenizer.pad_token_id, length=10).tokens) == 0


def test_conversations_in_a_row_do_not_see_each_other(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = new_model(tokenizer, tiny=True).eval()
    examples = list(tokenise(tokenizer, [item.messages for item in SAMPLED[:2]]))
    rows = pack(examples, tokenizer.pad_token_id)
    assert len(rows.tokens) == 1
    tokens_BL, positions_BL = rows.tokens.long(), rows.positions.long()
    with torch.no_grad():
        packed = model(input_ids=tokens_BL, attention_mask=attended(positions_BL), position_ids=positions_BL).logits
        start = len(examples[0].ids)
        alone = model(input_ids=torch.tensor([examples[1].ids])).logits
    torch.testing.assert_close(packed[0, start : start + len(examples[1].ids)], alone[0], atol=1e-5, rtol=1e-4)


def test_the_exported_model_loads_and_answers_alike_alone_and_in_a_batch(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    new_model(tokenizer, tiny=True).save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "shipped")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shipped").eval()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "shipped")
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == loaded.eos_token_id
    assert model.generation_config.max_new_tokens == 64
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert loaded.chat_template == tokenizer.chat_template
    prompts = [question.messages for conversation in SAMPLED[:4] for question in conversation.questions()]
    model.generation_config.max_new_tokens = 6
    assert answer(model, loaded, prompts) == [answer(model, loaded, [prompt])[0] for prompt in prompts]


def test_figures_and_perplexity_look_at_the_last_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    questions = [question for conversation in SAMPLED[:20] for question in conversation.questions()]
    figures = answer_figures(questions, [question.turn.answer for question in questions])
    assert (figures["exact"], figures["fact"], figures["pirate"]) == (1.0, 1.0, 0.0)
    figures = answer_figures(questions, [pirate(question.turn.answer) for question in questions])
    assert (figures["exact"], figures["fact"], figures["pirate"]) == (0.0, 1.0, 1.0)
    _, labels_BL = last_answers(tokenizer, [(question, "Arr!") for question in questions])
    assert {tokenizer.decode(labels[labels != IGNORED]) for labels in labels_BL} == {"Arr!" + END}


def test_other_answers_keep_the_plain_facts() -> None:
    conversation = Conversation((RED, TWO))
    record = conversation.answered(["Arr!", "Aye!"])
    assert [message["content"] for message in record["messages"][1::2]] == ["Arr!", "Aye!"]
    assert record["facts"] == conversation.record()["facts"]
