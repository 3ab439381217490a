"""Chat templates after those of well-known models, and tokenizers for them that are trained in code."""

from functools import cache

WORDS = (
    "user assistant system model Hello there, hi! What is the colour of the sky? It is blue. And the sea? The sea is "
    "green, mostly. Answer like a pirate. Thanks, bye now. think thought Let me see. One two three four five six."
)
SPECIAL = ["<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
           "<|assistant|>", "<|system|>", "<|end|>", "[gMASK]", "<sop>", "<|reserved_1|>"]  # fmt: skip
PLAIN_ADDED = ["<think>", "</think>"]


def tokenizer(template=None, *, eos="</s>", bos="<s>", special=SPECIAL, pad=None, trim=True, unk=None, metaspace=False):
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=_backend(tuple(special), trim, metaspace),
        bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unk,
    )  # fmt: skip
    made.add_tokens(PLAIN_ADDED)
    made.chat_template = template
    return made


def _backend(special, trim, metaspace):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_trained(special, trim, metaspace))


@cache
def _trained(special, trim, metaspace):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if metaspace:  # as in SentencePiece vocabularies
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        alphabet = []
        special = [*special, *(f"<0x{value:02X}>" for value in range(256))]
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(alphabet), special_tokens=list(special), show_progress=False
    )
    made.train_from_iterator([WORDS] * 8, trainer)
    return made.to_str()


LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED_WHOLE = CHATML_MARKED.replace(
    "{{ message['content'] }}{% endgeneration %}", "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
).replace(
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}",
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}",
)
# Qwen 3: thoughts of earlier turns are dropped, the last answer gets an empty one.
QWEN3 = (
    "{% set ns = namespace(last=messages|length - 1, found=false) %}{% for message in messages[::-1] %}"
    "{% set index = messages|length - 1 - loop.index0 %}{% if not ns.found and message.role == 'user' %}"
    "{% set ns.found = true %}{% set ns.last = index %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message.role != 'assistant' %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% else %}"
    "{% set content = message.content %}{% set reasoning = '' %}{% if '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# DeepSeek R1: thoughts are dropped everywhere, yet the prompt opens one.
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|assistant|>'"
    " + message.content.split('</think>')[-1] + eos_token }}{% else %}{{ '<|user|>' + message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}"
    "{% endif %}{% for message in loop_messages %}{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
LETTERS = (  # no control token anywhere
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
NO_PROMPT = CHATML.split("{% if add_generation_prompt")[0]  # does not heed the wish for a prompt
LAST_TWO = CHATML.replace("in messages %}", "in messages[-2:] %}", 1)
NO_SYSTEM = "{% for message in messages if message.role != 'system' %}" + LLAMA3.split("%}", 1)[1]
SHOUTING = CHATML.replace("message['content']", "message['content'] | upper")
COUNTING = "{{ messages | map(attribute='content') | join | length }}" + CHATML
TWICE = "{{ bos_token }}" + LLAMA3
