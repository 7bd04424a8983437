# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  # a template is easier to read on one line
"""Chat templates: what they may do, what they may not, and what their errors say."""

import datetime
import threading

import pytest

from pretrained.errors import TokenizerError
from pretrained.text.chat import render_chat

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<é>"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ m.role ~ ':' ~ m['content'] }};{% endfor %}", "user:hi;assistant:<é>;"),
        # Blocks leave neither their line's end nor the blanks before them.
        ("{% if true %}\n  {% for m in messages %}\nx\n  {% endfor %}\n{% endif %}\nend", "x\nx\nend"),
        ("{{ messages[1] | tojson }}", '{"role": "assistant", "content": "<é>"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi"),
        ("{% for m in messages[::-1] %}{{ loop.index0 }}{{ loop.length }}{{ loop.last }}{% endfor %}", "02False12True"),
        ("{% for m in messages if m.role == 'x' %}a{% else %}none{% endfor %}", "none"),
        ("{% for m in missing %}a{% endfor %}{{ missing }}", ""),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}", "hi"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ ' x '.strip() }}{{ '%s!' % 'y' }}{{ '{}?'.format('z') }}", "a+bxy!z?"),
        ("{{ '9' * 3 }}{{ 'ab'.replace('a', 'c') }}{{ 'a\nb' | indent(2) }}", "999cba\n  b"),
        ("{{ add_generation_prompt }} {{ bos_token }} {{ tools }} {{ documents }}", "True <s> None None"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(obj, context) %}{{ obj }}{{ context }}{% endmacro %}{{ f(obj=1, context=2) }}", "12"),
        ("{{ '{} 0123456789012345678'.format(1) }}", "1 0123456789012345678"),
    ],
)  # fmt: skip
def test_renders(template, text):
    assert render_chat(template, HELLO, add_generation_prompt=True, bos_token="<s>") == text


def test_strftime_now():
    assert render_chat("{{ strftime_now('%Y') }}", HELLO) == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if true %}{% break %}{% endif %}", r"not valid jinja2.*'break' outside loop"),
        ("a\n{% for %}", r"not valid jinja2 \(line 2: \{% for %\}\)"),
        ("a\n\n{{ raise_exception('roles must alternate') }}", r"refuses these messages \(line 3 .*: found roles must"),
        ("\n{{ nope.x }}", r"reads something that is not there \(line 2 .*'nope' is undefined"),
        ("{{ 1 / 0 }}", r"failed \(line 1 .*ZeroDivisionError"),
        ("{% include 'x' %}", r"failed .*no loader"),
    ],
)  # fmt: skip
def test_errors_name_the_line(template, message):
    with pytest.raises(TokenizerError, match=message):
        render_chat(template, HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_escapes_are_refused(template):
    with pytest.raises(TokenizerError, match=r"tries something unsafe \(line 1"):
        render_chat(template, HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages | map(attribute='__class__') | first }}",
    ],
)
def test_private_attributes_are_empty(template):
    assert render_chat(template, HELLO) == ""


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(1000) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% set x = range(99999) | list %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ [1] * 10 ** 9 }}",
        "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}",
        "{{ 'a' | center(10 ** 9) }}{{ 1 }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ '\t'.expandtabs(10 ** 9) }}",
        "{{ 'a' | indent(10 ** 9, first=true) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ range(9999) | list | join('x' * 9999) }}",
        "{{ ('x' * 9999).join(['a'] * 9999) }}",
        "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    ],
)  # fmt: skip
@pytest.mark.timeout(20)
def test_bombs_are_defused(template):
    with pytest.raises(TokenizerError, match=r"takes too much|Range too big"):
        render_chat(template, HELLO)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", r"must be a list of messages: expected \[\{\"role\".*found str"),
        ({"role": "user"}, "found dict"),
        (["hi"], r"lacks its role \(message 0\).*found 'hi'"),
        ([HELLO[0], {"content": "x"}], r"\(message 1\).*found keys \['content'\]"),
    ],
)
def test_malformed_conversations(messages, message):
    with pytest.raises(TokenizerError, match=message):
        render_chat("x", messages)


def test_budgets_are_of_one_rendering_and_thread():
    template = "{% for i in range(40000) %}{{ messages[0].content }}{% endfor %}"
    texts = []

    def work():
        texts.extend(render_chat(template, HELLO) for _ in range(4))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["hi" * 40000] * 8


def test_long_documents_pass():
    document = [{"role": "user", "content": "line of text\n" * 100_000}]
    template = "{{ messages[0].content.replace('text', 'prose') | trim }}"
    assert len(render_chat(template, document)) == 14 * 100_000 - 1
