"""Chat templates as adapters ship them, and hostile ones."""

from __future__ import annotations

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Hi é "𝄞"\n<b>'},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALPACA = """{{ bos_token }}{% for m in messages %}
    {% if m.role == 'system' %}
{{ m.content }}

    {% elif m.role == 'user' -%}
    ### Instruction:
    {{ m.content }}
    {%- else %}
### Response:
{{ m.content | trim }}{{ eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}### Response:
{% endif %}"""
GOOD = {
    "ChatML": CHATML,
    "Alpaca": ALPACA,
    "refuses other roles": "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ raise_exception('no tools') }}{% endif %}{{ m.content }}{% endfor %}",
    "date and JSON": "{{ strftime_now('%Y') }} {{ messages | tojson }} {{ messages[0]|tojson(2) }}",
    "loop": "{% for m in messages %}{{ 'A' if loop.first else loop.index0 }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}"
    "{% endfor %}{{ n.i }}{{ tools is none }}{{ documents is defined }}{{ pad_token }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
}
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
POWER = "{{ 7 ** (7 ** (8 + messages | length)) }}"  # one operation of C that nothing interrupts
OVER_TIME = {"nested loops": ENDLESS, "a power": POWER}
OVER_MEMORY = {
    "a product": "{{ 'x' * 10 ** 10 }}",
    "a list": "{% for a in range(30) %}{% set n = (n or [messages]) %}{% endfor %}"
    "{{ ([0] * 10 ** 9) | length }}",
    "a filter": "{{ ('%0' ~ 10 ** 9 ~ 'd') | format(1) | length }}",
}
