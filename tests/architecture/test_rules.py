"""Rules of the code base that no linter knows."""

import ast
import re
import subprocess
import sys

import pytest

from tests.architecture.source import PACKAGE, ROOT, Function, functions, modules, tracked_files
from tests.long import LONG

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60

# (module, function) -> why anything at all may come out of the call, and what happens to it.
BROAD_HANDLERS = {
    ("kasmina/growth.py", "build_seed"): "the user's blueprint; reported as CommandRefused with its cause",
    ("task.py", "users_code"): "the user's task, model and data; reported as TaskError with its cause",
    ("telemetry/sinks/worker.py", "SinkThread._attempt"): "a sink's package or service; the sink is given up, and told",
    ("tamiyo/desk.py", "Desk._decide"): "the user's policy; logged, and answered without commands",
    ("tamiyo/outbox.py", "SignalOutbox._raised"): "the user's policy; logged, and nothing is raised",
    ("tamiyo/policies/__init__.py", "_import_class"): "the user's module; reported as ConfigError with its cause",
    ("tamiyo/policies/__init__.py", "_make"): "the user's policy class; reported as ConfigError with its cause",
}
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[tuple[str, str], str] = {}

UNPICKLING_CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle"}
OBJECT_COLLECTIVES = {
    "all_gather_object", "broadcast_object_list", "gather_object", "recv_object_list", "scatter_object_list",
    "send_object_list",
}  # fmt: skip
# Folders of one person's or one service's machine; the parts are joined so that this file does not match itself.
MACHINE_PATH = re.compile("(?<![\\w.])/(" + "|".join(["work", "ro" + "ot", "home", "Users", "opt", "mnt"]) + r")/[\w.]")


def is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(name is None or ast.unparse(name) in ("Exception", "BaseException") for name in names)


def ends_in_raise(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def own_nodes(function: Function) -> list[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        found.append(node)
        if not isinstance(node, Function | ast.ClassDef):
            waiting.extend(ast.iter_child_nodes(node))
    return found


NOT_WITH_THE_SUITE = {ROOT / "tests/faults/test_partition.py", *(ROOT / name for name in LONG)}  # `make faults`, `long`


def test_only_listed_functions_catch_everything() -> None:
    found = {
        (path, name)
        for path, tree in modules().items()
        for name, function in functions(tree)
        for node in own_nodes(function)
        if isinstance(node, ast.ExceptHandler) and is_broad(node) and not ends_in_raise(node)
    }
    assert found == set(BROAD_HANDLERS)


def test_no_module_catches_everything_while_it_is_imported() -> None:
    handlers = {
        path: [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and is_broad(node)]
        for path, tree in modules().items()
    }
    in_functions = {
        id(node) for tree in modules().values() for _, function in functions(tree) for node in own_nodes(function)
    }
    assert [path for path, nodes in handlers.items() if any(id(node) not in in_functions for node in nodes)] == []


def unpickles(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return any(alias.name in OBJECT_COLLECTIVES for alias in node.names)
    if isinstance(node, ast.Attribute):
        return node.attr in OBJECT_COLLECTIVES or ast.unparse(node) in UNPICKLING_CALLS
    return False


def test_nothing_is_unpickled_or_sent_as_an_object() -> None:
    nodes = ((path, node) for path, tree in modules().items() for node in ast.walk(tree))
    assert [f"{path}:{node.lineno}: {ast.unparse(node)}" for path, node in nodes if unpickles(node)] == []


def test_files_are_short() -> None:
    lengths = {path: len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path in modules()}
    too_long = {path: length for path, length in lengths.items() if length > MAX_FILE_LINES}
    assert set(too_long) == set(LONG_FILES), too_long


def code_lines(function: Function) -> int:
    """Lines of a function without its docstring, which may be as long as its contract."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def test_functions_are_short() -> None:
    lengths = {(path, name): code_lines(node) for path, tree in modules().items() for name, node in functions(tree)}
    too_long = {key: length for key, length in lengths.items() if length > MAX_FUNCTION_LINES}
    assert set(too_long) == set(LONG_FUNCTIONS), too_long


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = []
    for path in tracked_files():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line}" for n, line in enumerate(lines, 1) if MACHINE_PATH.search(line)
        ]
    assert found == []


@pytest.mark.parametrize("module", ["tolaria", "tolaria.options", "tolaria.tamiyo.server"])
def test_what_must_start_at_once_does_not_import_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit(' '.join({{'torch', 'sklearn'}} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_every_test_is_collected(request: pytest.FixtureRequest) -> None:
    """Folders of certain names, "dist" among them, are passed over by default."""
    session = request.session
    if session.config.args != session.config.getini("testpaths") or session.config.getoption("keyword"):
        pytest.skip("only a part of the suite was asked for")
    collected = {item.path for item in session.items}
    assert set((ROOT / "tests").rglob("test_*.py")) - collected - NOT_WITH_THE_SUITE == set()
