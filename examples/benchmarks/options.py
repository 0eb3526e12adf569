"""Values on the command lines of the benchmarks."""

import ast


def literal(text):
    """Read a Python literal; all else is text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def assignment(text):
    """Read NAME=VALUE."""
    name, _, value = text.partition("=")
    return name, literal(value)
