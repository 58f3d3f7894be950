"""Chat templates by name, for recipes that ask for one; written from each format's public description."""

_LOOP = "{% for message in messages %}"
_END = "{% endfor %}"

CHAT_TEMPLATES = {
    "chatml": (
        _LOOP
        + "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        + _END
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "alpaca": (
        _LOOP
        + "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        + "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        + "{% else %}### Response:\n{{ message['content'] }}\n\n{% endif %}"
        + _END
        + "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        + _LOOP
        + "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
        + _END
        + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        + _LOOP
        + "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
        + "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
        + "{% else %}{{ message['content'] }}{% endif %}"
        + _END
    ),
    "exaone": (
        _LOOP
        + "{% if message['role'] == 'user' %}[|user|]{{ message['content'] }}\n"
        + "{% else %}[|{{ message['role'] }}|]{{ message['content'] }}[|endofturn|]\n{% endif %}"
        + _END
        + "{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
}
