"""Refuses steps of a chat template that a count of its lines would not catch."""

import re
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes

from .template_steps import TemplateError

_MOST_CHARACTERS = 1_000_000
"""The longest template that is accepted; long ones have tens of thousands of
characters."""
_MOST_NUMBER = 1_000_000
_MOST_TIMES = 128
_LONG_NUMBER = re.compile(r"\d{7,}")
_WITHOUT_END = {"lipsum"}
"""Functions of jinja that make text of any length."""


@lru_cache
def check_template(template: str) -> None:
    """Raises TemplateError for a template that is too long, and for powers, products
    and numbers that no chat needs: one of them can take all memory.

    Text that is not a template is left to whoever renders it.
    """
    if len(template) > _MOST_CHARACTERS:
        raise TemplateError(f"it has {len(template):,} characters")
    environment = jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols])
    try:
        tree = environment.parse(template)
    except jinja2.TemplateError:
        return
    for node in tree.find_all((nodes.Const, nodes.Mul, nodes.Pow, nodes.Name)):
        why = _why_not(node)
        if why:
            raise TemplateError(f"line {node.lineno} of it {why}")


def _why_not(node: nodes.Node) -> str:
    match node:
        case nodes.Pow():
            return "raises to a power"
        case nodes.Name(name=str(name)) if name in _WITHOUT_END:
            return f"calls {name}"
        case nodes.Const(value=bool()):
            return ""
        case nodes.Const(value=int() | float() as value) if abs(value) > _MOST_NUMBER:
            return f"has the number {value:.7g}"
        case nodes.Const(value=str(text)) if found := _LONG_NUMBER.search(text):
            return f"has the number {found[0][:20]}"
        case nodes.Mul(left=left, right=right):
            operands = (left, right)
            if not any(map(_is_small, operands)):
                return "has a product that may be of any size"
            if any(isinstance(of, nodes.Mul) or of.find(nodes.Mul) for of in operands):
                return "has a product of a product"
    return ""


def _is_small(node: nodes.Node) -> bool:
    """Whether `node` is a small number: multiplying text by it does not make the text
    too long."""
    return (
        isinstance(node, nodes.Const)
        and isinstance(node.value, int | float)
        and abs(node.value) <= _MOST_TIMES
    )


class _Generation(jinja2.ext.Extension):
    """The tag that transformers adds, around what an assistant says."""

    tags = {"generation"}  # noqa: RUF012 (as jinja has it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
