"""The sandbox: what templates may do, what clients may send. Fidelity is tested in test_tokenizer.py."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import jinja2
import pytest

from tandem.common.chat_template import MARK_END, MARK_START, MAX_RENDERED, ChatTemplate, unmark
from tandem.common.errors import InvalidRequest, ModelError

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages: Any = HELLO, **arguments: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **arguments)


def test_blocks_leave_no_whitespace() -> None:
    assert render("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n") == "user\n"


def test_whitespace_matches_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{{ bos_token }}\n\n{% for m in messages %}\n    {%- if loop.first %}\n first {% continue %}{% endif %}\n"
        "  {{ m | tojson(indent=2) }} {% break %}\n{% endfor %}\n{% generation %}\n x \n{% endgeneration %}\n\n"
        "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ dict(a=1) }}{{ tools is none }}\n"
    )
    messages = [{"role": "user", "content": "<é> & '\""}, {"role": "user", "content": "b"}, {"role": "user"}]
    rendered, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, bos_token="<s>")
    assert render(source, messages) == rendered[0]


def test_tokens_and_arguments_are_variables() -> None:
    assert render("{{ bos_token }}{{ flag }}{{ add_generation_prompt }}", flag=[1, None]) == "<s>[1, None]True"


def test_json_is_not_escaped_for_html() -> None:
    assert render("{{ messages[0].content | tojson }}", [{"role": "user", "content": "<a> & é"}]) == '"<a> & é"'


def test_the_date_is_todays() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_parts_of_text_become_one_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"


def test_none_is_left_out() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": None}
    assert render("{{ messages[0].keys() | list }}", [message]) == "['role']"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["x"], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": 7, "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "user", "content": {"text": "x"}}], "messages[0].content"),
        ([*HELLO, {"role": "user", "content": [{"type": "image_url"}]}], "messages[1].content[0]"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content[0]"),
    ],
)
def test_malformed_messages_name_the_place(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render("{{ messages[0].content }}", messages)
    assert caught.value.param == param


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        ChatTemplate(None, {}).render(HELLO)


def test_what_the_template_objects_to_reaches_the_client() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__.__base__}'.format(1).x.y }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' | nothing }}",
        "{% include 'other' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_faults_and_escapes_are_refused(source: str) -> None:
    with pytest.raises((InvalidRequest, ModelError)):
        render(source)


def test_output_is_limited() -> None:
    messages = [{"role": "user", "content": "x" * (MAX_RENDERED // 1000)}]
    source = "{% for i in range(count) %}{{ messages[0].content }}{% endfor %}"
    assert len(render(source, messages, count=1000)) > MAX_RENDERED - 1000
    with pytest.raises(InvalidRequest, match="characters"):
        render(source, messages, count=1001)


@pytest.mark.parametrize("name", ["messages", "raise_exception", "strftime_now"])
def test_arguments_cannot_replace_what_the_template_relies_on(name: str) -> None:
    arguments: dict[str, Any] = {name: "x"}
    with pytest.raises(InvalidRequest, match=name):
        ChatTemplate("{{ messages[0].content }}", {}).render(HELLO, **arguments)


def test_arguments_are_plain_data() -> None:
    with pytest.raises(InvalidRequest, match="type object"):
        render("{{ x }}", x=object())


def test_broken_template_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match="line 2"):
        ChatTemplate("a\n{% for %}", {})


def test_all_client_strings_are_protected_and_the_templates_own_are_not() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ messages[0].content }}{{ tools[0].name }}{{ x.y }}",
        {"bos_token": "T"},
        lambda text: text.replace("T", f"{MARK_START}T{MARK_END}"),
    )
    text = template.render([{"role": "user", "content": "aT"}], tools=[{"name": "bT"}], x={"y": "cT"})
    marked = f"{MARK_START}T{MARK_END}"
    assert text == f"Ta{marked}b{marked}c{marked}"
    assert unmark(text) == "TaTbTcT"


def test_jinja_is_recent_enough_for_its_sandbox() -> None:
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6)
