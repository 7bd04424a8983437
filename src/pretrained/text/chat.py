# SPDX-License-Identifier: Apache-2.0
"""Chat templates: jinja2 programs that come with a model, run where they can do no harm.

A template is a stranger's code. It runs in jinja2's immutable sandbox (no private attributes, no
changing of what it is given, ranges of at most 100,000), and under the budget of
`pretrained.text.chat_limits`. What it may use is what the ecosystem's templates use:
``raise_exception``, ``strftime_now``, ``tojson``, ``break`` and ``continue``, and the ``generation``
block, whose marks are not kept.
"""

from __future__ import annotations

import datetime
import functools
import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

try:
    import jinja2
    from jinja2 import nodes, pass_context, pass_eval_context
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.filters import do_join
    from jinja2.nodes import EvalContext
    from jinja2.parser import Parser
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    from pretrained.errors import MissingDependencyError

    raise MissingDependencyError(
        "Chat templates need the jinja2 package", mend="Install it: pip install 'pretrained[text]'."
    ) from error

from pretrained.errors import TokenizerError
from pretrained.text.chat_limits import (
    MAX_TEMPLATE,
    Budget,
    OverBudgetError,
    check_join,
    check_length,
    check_method,
    check_operator,
    checked,
    weigh,
)

_NAME = "<chat template>"
_Message = Mapping[str, Any]


def render_chat(
    template: str,
    messages: Sequence[_Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """Write a conversation as the text that a model was trained on.

    Args:
        template: The jinja2 source.
        messages: Each with a ``role`` and usually a ``content``.
        tools: JSON schemas of functions that the model may call.
        documents: Texts that it may refer to.
        add_generation_prompt: End with the start of an answer.
        **variables: What else the template reads; tokenizers pass ``bos_token`` and so on.

    Raises:
        TokenizerError: the conversation is malformed, or the template is, fails, refuses it, or tries
            something that is not allowed; the message names the template's line.
    """
    check_messages(messages)
    program = _compile(template)
    budget = Budget()
    token = Budget.current.set(budget)
    try:
        parts = []
        for part in program.generate(
            messages=messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **variables,
        ):
            parts.append(part)
        return "".join(parts)
    except _RefusedByTemplateError as error:
        _fail(
            "The chat template refuses these messages", error, found=str(error), mend="Change the messages."
        )
    except OverBudgetError as error:
        _fail("The chat template takes too much", error, found=str(error), mend=_PASS_ANOTHER)
    except jinja2.exceptions.SecurityError as error:
        _fail(
            "The chat template tries something unsafe",
            error,
            found=str(error),
            mend="Do not trust this model.",
        )
    except jinja2.exceptions.UndefinedError as error:
        mend = "Pass what it reads as a keyword argument, or in the messages."
        _fail("The chat template reads something that is not there", error, found=str(error), mend=mend)
    except RecursionError as error:
        _fail("The chat template takes too much", error, found="endless recursion", mend=_PASS_ANOTHER)
    except Exception as error:  # whatever a template's own operations raise
        _fail("The chat template failed", error, found=f"{type(error).__name__}: {error}", mend=_PASS_ANOTHER)
    finally:
        Budget.current.reset(token)


def cut_after_final_message(text: str, messages: Sequence[_Message]) -> str:
    """End a rendered conversation inside its last message, for a model to go on with.

    Args:
        text: What `render_chat` wrote.
        messages: The conversation.

    Raises:
        TokenizerError: the template changed the last message, so its end cannot be found.
    """
    content = messages[-1].get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = next((part["text"] for part in reversed(content) if "text" in part), None)
    if isinstance(content, str):
        # Templates often strip the content.
        for candidate in (content, content.strip()):
            start = text.rfind(candidate)
            if start >= 0:
                return text[: start + len(candidate)]
    raise TokenizerError(
        "The last message is not found in what the chat template made of it",
        where="continue_final_message",
        found=repr(content)[:80],
        mend="This template changes messages; end the prompt by hand.",
    )


def check_messages(messages: Sequence[_Message]) -> None:
    """Raise TokenizerError unless this is a conversation.

    Args:
        messages: Each a mapping with a ``role``.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TokenizerError(
            "A conversation must be a list of messages",
            expected='[{"role": "user", "content": "..."}]',
            found=type(messages).__name__,
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            found = (
                f"keys {sorted(map(str, message))}" if isinstance(message, Mapping) else repr(message)[:80]
            )
            raise TokenizerError(
                "A message of a conversation lacks its role",
                where=f"message {i}",
                expected='{"role": "user", "content": "..."}',
                found=found,
            )


# Filters for web pages, and those whose work no size tells.
_NOT_OFFERED = ("filesizeformat", "pprint", "random", "urlize", "wordwrap", "xmlattr")

_PASS_ANOTHER = "Pass another one as chat_template=..."


class _RefusedByTemplateError(Exception):
    """A template called ``raise_exception``."""


class _GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}``: renders its content."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 reads a plain class attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the content's nodes."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with a budget on everything that repeats or grows."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Check an operation before and after it is made."""
        check_operator(operator, left, right)
        return checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a call, and check what a string's method would make."""
        # The odd names are jinja2's: a template's own keyword arguments may be called self or context.
        Budget.current.get().spend_call()
        # jinja2 wraps str.format in a safe function of its own.
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            name = method.__name__
            if name == "join" and args:
                args = (list(args[0]), *args[1:])
                check_join(owner, args[0])
            check_method(name, owner, args, kwargs)
        return checked(super().call(__context, __obj, *args, **kwargs))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        # Loops and the ~ operator cannot be intercepted when they run, so the program is changed: what
        # a loop goes over passes through a counting filter, and what ~ joins through a checking one.
        for loop in list(source.find_all(nodes.For)):
            loop.iter = self._filtered("_counted", typing.cast(nodes.Expr, loop.iter))
        for node in list(source.find_all(nodes.Node)):
            for name, child in list(node.iter_fields()):
                if _is_made(child):
                    setattr(node, name, self._filtered("_checked", child))
                elif isinstance(child, list):
                    child[:] = [self._filtered("_checked", c) if _is_made(c) else c for c in child]
        for output in list(source.find_all(nodes.Output)):
            output.nodes = [self._filtered("_written", self._expression(part)) for part in output.nodes]
        return super()._generate(source, *args, **kwargs)

    def _expression(self, part: nodes.Expr) -> nodes.Expr:
        return nodes.Const(part.data, lineno=part.lineno) if isinstance(part, nodes.TemplateData) else part

    def _filtered(self, name: str, node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self)


def _is_made(node: object) -> bool:
    """Tell whether an expression joins texts, or makes a list or the like, where nothing else looks at it."""
    if isinstance(node, nodes.Tuple):
        return node.ctx == "load"
    return isinstance(node, nodes.Concat | nodes.List | nodes.Dict)


# Filters with a context are never run ahead by jinja2, when no budget is there yet.
@pass_context
def _written(context: Context, value: Any) -> str:
    """What an expression or a piece of the template writes, taken off the budget."""
    Budget.current.get().spend_step()
    text = str(checked(value))
    Budget.current.get().spend_output(len(text))
    return text


@pass_context
def _checked(context: Context, value: Any) -> Any:
    return checked(value)


@pass_context
def _counted(context: Context, items: Any) -> Any:
    # jinja2's `loop.length` and the like work with any iterator; an undefined value stays what it is.
    return _count(iter(items)) if not isinstance(items, jinja2.Undefined) else items


def _count(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        Budget.current.get().spend_step()
        yield item


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is checked before it is made."""
    # Some filters get jinja2's environment or evaluation context before their own arguments.
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if budget := Budget.current.get(None):
            budget.spend_call()
        values = [_limited(value) for value in args]
        check_method(name, values[skip], tuple(values[skip + 1 :]), kwargs)
        return _limited(checked(function(*values, **kwargs)))

    return guarded


def _limited(value: Any) -> Any:
    """An iterator whose steps are counted, in place of one whose steps are not; other values as they are."""
    return _count(value) if isinstance(value, Iterator) else value


@pass_eval_context
def _join(context: EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    Budget.current.get().spend_call()
    items = list(_limited(value))
    check_join(d, items)
    return str(do_join(context, items, d, attribute))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training: jinja2's own filter would escape HTML."""
    check_length(weigh(value) * (1 + (indent if isinstance(indent, int) else len(indent or ""))))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedByTemplateError(message)


def _strftime_now(format_: str) -> str:
    check_length(64 * len(format_))
    return datetime.datetime.now().strftime(format_)


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationBlock]
    )
    # Padding and replacing filters take sizes from the template.
    for name in _NOT_OFFERED:
        del environment.filters[name]
    del environment.globals["lipsum"]
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _guarded(name, function)
    environment.filters["join"] = _join
    environment.filters["tojson"] = _guarded("tojson", _to_json)
    environment.filters["_counted"] = _counted
    environment.filters["_checked"] = _checked
    environment.filters["_written"] = _written
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE:
        raise TokenizerError(
            "The chat template is too long",
            expected=f"at most {MAX_TEMPLATE:,} characters",
            found=f"{len(template):,}",
            mend=_PASS_ANOTHER,
        )
    environment = _environment()
    try:
        code = environment.compile(template, filename=_NAME)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise TokenizerError(
            "The chat template is not valid jinja2",
            where=_line(template, error.lineno),
            found=error.message,
            mend=_PASS_ANOTHER,
        ) from error
    except SyntaxError as error:
        # Of the Python that jinja2 writes: it lets a break through that stands in no loop.
        raise TokenizerError(
            "The chat template is not valid jinja2", found=error.msg, mend=_PASS_ANOTHER
        ) from error
    except RecursionError as error:
        raise TokenizerError("The chat template is nested too deeply", mend=_PASS_ANOTHER) from error
    program = environment.template_class.from_code(environment, code, environment.make_globals(None))
    return program


def _line(template: str, number: int) -> str:
    lines = template.splitlines()
    text = lines[number - 1].strip()[:60] if 0 < number <= len(lines) else ""
    return f"line {number}: {text}" if text else f"line {number}"


def _fail(what: str, error: BaseException, *, found: str, mend: str) -> NoReturn:
    number = _template_line(error.__traceback__)
    where = f"line {number} of the template" if number else None
    raise TokenizerError(what, where=where, found=found[:500], mend=mend) from error


def _template_line(trace: TracebackType | None) -> int | None:
    """The innermost line of the template in a traceback, which jinja2 has translated."""
    number = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _NAME:
            number = trace.tb_lineno
        trace = trace.tb_next
    return number
