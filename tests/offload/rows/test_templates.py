"""A chat template is a program of somebody else's: what it may do is bounded."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import hostile
from penstock.offload.rows.template_budget import template_budget
from penstock.offload.rows.template_check import check_template
from penstock.offload.rows.template_steps import TemplateError


def _rendered(template: str, **limits: Any) -> str:
    environment = ImmutableSandboxedEnvironment()
    with template_budget(**limits):
        made = environment.from_string(template)
        return made.render(messages=[{"content": "hello"}] * 3)


def test_a_chat_template_runs_as_ever_within_its_budget() -> None:
    before = sys.gettrace()
    template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    assert _rendered(template) == "<hello>" * 3
    assert sys.gettrace() is before


def test_a_chat_template_that_would_run_for_ever_is_stopped() -> None:
    many = "{% for a in range(99999) %}"
    before = sys.gettrace()
    with pytest.raises(TemplateError, match="more than 20,000 lines"):
        _rendered(many * 4 + "{% endfor %}" * 4, max_lines=20_000)
    assert sys.gettrace() is before


def test_a_chat_template_that_makes_text_without_end_is_stopped() -> None:
    grow = "{% set text = namespace(it='x') %}{% for a in range(30) %}"
    grow += "{% set text.it = text.it ~ text.it %}{% endfor %}"
    with pytest.raises(TemplateError, match="too much text"):
        _rendered(grow, max_growth_bytes=64 << 20)


LONG = "{% set x = 'a b,'|center(60000) %}{{ "


@pytest.mark.parametrize(
    "template",
    [
        "{{ range(9999)|map('center', 999999)|list|length }}",
        "{{ " + " ~ ".join(["('a'|center(999999))"] * 999) + " }}",
        "{{ range(9999)|map('center', 999999)|list|int(5) }}",
        LONG + "x|join(x) }}",
        LONG + "x.join(x) }}",
        LONG + "x|replace(' ', x) }}",
        LONG + "x.replace(' ', x) }}",
        LONG + "x.replace(' ', '\t').expandtabs(60000) }}",
        LONG + "x.replace(' ', '\t').expandtabs(tabsize=60000) }}",
        LONG + "x.replace(' ', '\n')|indent(60000) }}",
        LONG + "x.replace(' ', '\n')|indent(x) }}",
        LONG + "x.replace(' ', '{0}').format(x) }}",
        LONG + "x.replace(' ', '{y}').format(y=x) }}",
        LONG + "x.replace(' ', '%s')|format(x) }}",
        LONG + "x.translate({32: x}) }}",
        LONG + "x.center(9999999999) }}",
    ],
)
def test_a_step_of_a_chat_template_that_would_take_all_memory_is_not_begun(
    template: str,
) -> None:
    with hostile.limits(), pytest.raises(TemplateError, match="too much text"):
        _rendered(template, max_growth_bytes=200 << 20, max_seconds=60)


def test_a_chat_template_whose_lines_take_long_is_stopped() -> None:
    sums = "range(9999)|map('center', 99999)|map('length')|sum"
    for step in (sums, "range(99999)|list|length"):
        template = f"{{% for a in range(9999) %}}{{{{ {step} }}}}{{% endfor %}}"
        with pytest.raises(TemplateError, match=r"more than 0\.3 s"):
            _rendered(template, max_seconds=0.3)


def test_long_texts_in_a_chat_template_are_no_bombs() -> None:
    text = "x" * 1_000_000
    template = "{{ text.replace('x' * 100, 'y')|length }}{{ [text, text]|join(', ')"
    template += "|length }}{{ '%s and %s'|format(text, text)|length }}{{ text.format()"
    template += "|replace(text, 'a') }}{{ text.startswith(text) }}"
    made = ImmutableSandboxedEnvironment().from_string(template)
    with template_budget():
        assert made.render(text=text) == "1000020000022000005aTrue"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 10 ** 10 }}", "raises to a power"),
        ("{{ 'a' * 9999999999 }}", "a product that may be of any size"),
        ("{{ 'a' * ('99999' ~ '99999')|int }}", "a product that may be of any size"),
        ("{{ '%9999999999d' % 1 }}", "has the number 9999999999"),
        ("{{ 'a' * 100 * 100 }}", "a product of a product"),
        ("{{ lipsum(n=5) }}", "calls lipsum"),
        ("a" * 1_000_001, "1,000,001 characters"),
        ("{% generation %}{{ 'a'|center(10000000) }}{% endgeneration %}", "1e\\+07"),
    ],
)
def test_a_chat_template_of_which_one_step_takes_all_memory_is_refused(
    template: str, why: str
) -> None:
    with pytest.raises(TemplateError, match=why):
        check_template(template)


def test_what_chats_need_is_no_bomb() -> None:
    check_template(
        "{% for m in messages %}{% if loop.index0 % 2 == 1 or true %}{{ '=' * 80 }}"
        "{{ m.content|tojson(indent=4) }}{{ 2 * loop.index }}{% continue %}{% endif %}"
        "{% generation %}{{ m['role'] }}{% endgeneration %}{% endfor %}"
    )
    check_template("{% what is no template is refused by who renders it")
