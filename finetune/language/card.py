"""The code on an adapter's card: it loads the model that was trained and answers a prompt."""

import json

import torch

from finetune import hub
from finetune.config.schema import ModelConfig, Quantize
from finetune.data.text.tokens import Chat
from finetune.memory import quantize

ADAPTER = '"adapter/peft"'
CPU_LAYOUT = """for layer in base.modules():  # on a CPU, bitsandbytes' own layout is coarser and takes no small layers
    layer.support_avx512bf16_for_cpu = False
"""


def usage(model: ModelConfig, chat: Chat, *, template: str, dtype: torch.dtype, prompt: str) -> str:
    """Python, `{base}` to be filled in as `str.format` does.

    template: as `data.chat_template`. dtype: of the training's arithmetic, in which a quantised base computes.
    """
    quantised = model.quantize is not Quantize.none
    # The folder has a tokenizer where the base's own is not the run's.
    tokenizer = ADAPTER if template or model.added_tokens else "{base}"
    imports = "import torch\n" if quantised else ""
    return f"""{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{", BitsAndBytesConfig" if quantised else ""}

tokenizer = AutoTokenizer.from_pretrained({tokenizer})
{_load_base(model, dtype)}{_make_room(model, chat)}model = PeftModel.from_pretrained(base, {ADAPTER})

{_read_prompt(prompt, chat)}
answer = model.generate(**inputs.to(model.device), max_new_tokens=128, eos_token_id={list(chat.stop_ids())})
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def _load_base(model: ModelConfig, dtype: torch.dtype) -> str:
    if model.quantize is Quantize.none:
        return "base = AutoModelForCausalLM.from_pretrained({base})\n"
    return (
        f"stored = {quantize.as_code(model.quantize, dtype)}\n"
        f"base = AutoModelForCausalLM.from_pretrained({{base}}, dtype={dtype}, quantization_config=stored)\n"
        + (CPU_LAYOUT if model.quantize is Quantize.nf4 else "")
    )


def _make_room(model: ModelConfig, chat: Chat) -> str:
    """More rows of the embedding, where the new tokens need them."""
    from transformers import AutoConfig

    rows = max(chat.tokenizer.convert_tokens_to_ids(model.added_tokens), default=-1) + 1
    if rows <= hub.load(AutoConfig, model.base).get_text_config().vocab_size:
        return ""
    return f"base.resize_token_embeddings({rows}, mean_resizing=False)  # the adapter holds the new rows\n"


def _read_prompt(prompt: str, chat: Chat) -> str:
    spelt = json.dumps(prompt, ensure_ascii=False).replace("{", "{{").replace("}", "}}")
    if not chat.template.text:
        return f'inputs = tokenizer({spelt}, return_tensors="pt")'
    return (
        f'messages = [{{{{"role": "user", "content": {spelt}}}}}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)"
    )
