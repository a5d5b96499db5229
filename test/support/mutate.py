"""Replaces an expression or statements inside one function of a source text.

The place is found in the syntax tree, so that formatting, comments and other functions do not
matter. In a pattern `_` matches any expression, `_` as a statement any statement, and `f(___)` any
arguments.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Sequence


def mutate(source: str, function: str, old: str, new: str) -> str:
    """Replace what matches `old` in a function.

    Args:
        source: text of a module.
        function: its name with the classes and functions around it, joined by "."; "" for the
            module.
        old: pattern, one expression or some statements.
        new: what stands there instead.

    Raises:
        LookupError: there is no such function, or not exactly one match in it.
    """
    tree = find_function(ast.parse(source), function)
    pattern = ast.parse(textwrap.dedent(old)).body
    found: list[tuple[ast.AST, ast.AST]] = []
    if len(pattern) == 1 and isinstance(pattern[0], ast.Expr):
        wanted = pattern[0].value
        found = [(node, node) for node in ast.walk(tree) if matches(wanted, node)]
    if not found:
        found = [
            (block[i], block[i + len(pattern) - 1])
            for block in blocks(tree)
            for i in range(len(block) - len(pattern) + 1)
            if all(map(matches, pattern, block[i : i + len(pattern)]))
        ]
    if len(found) != 1:
        raise LookupError(f"{function or 'module'} has {len(found)} times: {old}")
    return replace(source, *found[0], textwrap.dedent(new))


def find_function(tree: ast.Module, function: str) -> ast.AST:
    node: ast.AST = tree
    for name in filter(None, function.split(".")):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        inside = [n for n in ast.walk(node) if isinstance(n, kinds) and n.name == name]
        if not inside:
            raise LookupError(f"there is no {function}")
        node = inside[0]
    return node


def blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def matches(pattern: object, node: object) -> bool:
    """Whether a syntax tree is a pattern's; contexts (load, store) do not count."""
    if isinstance(pattern, ast.Name) and pattern.id == "_":
        return isinstance(node, ast.expr)
    if isinstance(pattern, ast.Expr) and getattr(pattern.value, "id", "") == "_":
        return isinstance(node, ast.stmt)
    if isinstance(pattern, ast.Call) and isinstance(node, ast.Call):
        names = [getattr(each, "id", "") for each in pattern.args]
        if names == ["___"]:
            return matches(pattern.func, node.func)
    if isinstance(pattern, ast.AST):
        return type(pattern) is type(node) and all(
            matches(getattr(pattern, name, None), getattr(node, name, None))
            for name in pattern._fields
            if name not in ("ctx", "type_comment")
        )
    if isinstance(pattern, list):
        return (
            isinstance(node, list)
            and len(pattern) == len(node)
            and all(map(matches, pattern, node))
        )
    return pattern == node


def replace(source: str, first: ast.AST, last: ast.AST, new: str) -> str:
    lines = source.encode().split(b"\n")  # columns of the syntax tree count bytes
    row, column = first.lineno - 1, first.col_offset  # type: ignore[attr-defined]
    end, end_column = last.end_lineno - 1, last.end_col_offset  # type: ignore[attr-defined]
    indented = new.strip("\n").replace("\n", "\n" + " " * column).encode()
    text = lines[row][:column] + indented + lines[end][end_column:]
    return b"\n".join([*lines[:row], text, *lines[end + 1 :]]).decode()


def apply(source: str, edits: Sequence[tuple[str, str, str]]) -> str:
    """Apply (function, old, new) one after the other; the result compiles."""
    for function, old, new in edits:
        source = mutate(source, function, old, new)
    compile(source, "mutated", "exec")
    return source
