"""The source of the blueprints that grew, to stand in a file of its own: cut out of Tolaria's, so it never differs.

A definition takes along every other one of its file that it names. The user's own blueprints stay where they are.
"""

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path

from tolaria.kasmina import blueprints as home
from tolaria.kasmina.blueprints import BUILT_IN, get_blueprint


def built_in_sources(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """(source, blueprint -> name of its class in it) of those that are Tolaria's own."""
    classes = {name: get_blueprint(name).build.__name__ for name in sorted(set(names)) if name in BUILT_IN}
    return definitions(Path(inspect.getfile(home)).read_text(encoding="utf-8"), classes.values()), classes


def definitions(source: str, wanted: Iterable[str]) -> str:
    """The top-level definitions of these names and of all that they name, in the order of the file."""
    tree = ast.parse(source)
    found = {name: node for node in tree.body for name in _defines(node)}
    needed: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name in found and name not in needed:
            needed.add(name)
            waiting += [n.id for n in ast.walk(found[name]) if isinstance(n, ast.Name)]
    nodes = [node for node in tree.body if needed.intersection(_defines(node))]
    return "\n\n\n".join(ast.get_source_segment(source, node) or "" for node in nodes)


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
