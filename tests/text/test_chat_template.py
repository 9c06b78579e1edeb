"""ChatTemplate renders what transformers renders, and runs foreign templates in a sandbox."""

import pytest

from turbotriton.contract.errors import InvalidInputError, WorkspaceError
from turbotriton.text.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße <b> & 日本"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "more"},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\n[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}\n{% endfor %}",
    "loop control": "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m | tojson }}\n{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(name, add_generation_prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        conversations=[MESSAGES],
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    template = ChatTemplate(TEMPLATES[name], "<s>", "</s>")
    assert template.render(MESSAGES, add_generation_prompt=add_generation_prompt) == expected[0]


def test_further_variables_reach_the_template():
    assert ChatTemplate("{{ enable_thinking }}").render(MESSAGES, enable_thinking=False) == "False"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "unsafe|not safely|refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_one_line(source, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        ChatTemplate(source).render(MESSAGES)
    assert "\n" not in str(caught.value)


def test_a_broken_template_is_refused_at_once():
    with pytest.raises(WorkspaceError, match="does not compile"):
        ChatTemplate("{% for m in messages %}")


def test_imports_neither_torch_nor_transformers():
    import subprocess
    import sys

    code = "import sys, turbotriton.text.chat_template; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
