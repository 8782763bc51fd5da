"""Who imports whom: schemas <- ple_data <- ple_train <- cli, and what may not be imported before it is
needed.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["schemas", "ple_data", "ple_train", "cli"]
HEAVY = {
    *("torch", "transformers", "vllm", "peft", "accelerate", "datasets", "polars", "pyarrow", "pydantic"),
    *("numpy", "pandas", "matplotlib", "httpx", "tokenizers", "scipy", "duckdb", "trl", "ray"),
}
ALLOWED_IN_SCHEMAS = {"pyarrow", "pydantic", "yaml", "schemas"}
ALLOWED_IN_CLI = {"click", "ple_data", "schemas"}


def sources() -> list[Path]:
    return [
        path
        for layer in LAYERS
        for path in ([ROOT / "cli.py"] if layer == "cli" else sorted((ROOT / layer).rglob("*.py")))
    ]


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """The packages that a file imports: anywhere in it, or only when it is imported itself."""
    found = set()
    for node in _nodes(ast.parse(path.read_text()), top_level):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = path.relative_to(ROOT).parts[0]
            found.add(relative if node.level else (node.module or "").split(".")[0])
    return found


def _nodes(tree: ast.AST, top_level: bool):
    for node in ast.iter_child_nodes(tree):
        yield node
        if top_level and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _typing_only(node)):
            continue
        yield from _nodes(node, top_level)


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_there_is_something_to_check():
    names = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert {"schemas/tables.py", "ple_data/storage/store.py", "ple_train/loss.py", "cli.py"} <= names


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_imports_upward(path):
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"tests"}
    assert not imports(path) & above


@pytest.mark.parametrize(
    "path", sorted((ROOT / "schemas").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_schemas_need_only_pyarrow_and_pydantic(path):
    assert imports(path) - sys.stdlib_module_names <= ALLOWED_IN_SCHEMAS


def test_cli_imports_only_click_at_the_top():
    assert imports(ROOT / "cli.py", top_level=True) - sys.stdlib_module_names <= ALLOWED_IN_CLI


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_vllm_only_in_its_engine(path):
    if path != ROOT / "ple_data" / "engines" / "vllm.py":
        assert "vllm" not in imports(path)


def loaded(module: str) -> set[str]:
    """The heavy packages that a fresh Python holds after importing a module of ours."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(found.stdout.split()) & HEAVY


def test_importing_cli_loads_nothing_heavy():
    assert loaded("cli") == set()


@pytest.mark.parametrize(
    "module", ["ple_data.storage.store", "ple_data.inspection", "ple_data.sampling.generate", "ple_data.scoring.score"]
)
def test_the_data_rooms_import_without_models(module):
    """ple-gen and ple-train live in separate environments: the store needs no torch, and training no vllm."""
    assert not loaded(module) & {"torch", "transformers", "vllm", "peft", "accelerate", "datasets"}


# The rooms: docs/make.py draws them, and gives each a floor above all that it imports


def made():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import make
    finally:
        sys.path.pop(0)
    return make


def test_no_room_imports_one_above_it():
    """A circle of rooms raises an error; the layers lie one above the other."""
    floors = made().floors()
    assert min(floor for name, floor in floors.items() if name == "cli") == max(floors.values())
    for layer, rooms in {"ple_data": 15, "ple_train": 15}.items():
        assert sum(name.startswith(f"{layer}.") for name in floors) <= rooms


def test_no_module_imports_itself_by_way_of_others():
    rooms = made()
    known = rooms.modules()
    below = {name: rooms.imports(path, set(known)) - {name} for name, path in known.items()}
    seen: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in seen:
            for other in below[name]:
                visit(other, [*path, name])
            seen.add(name)

    for name in below:
        visit(name, [])


def test_every_command_is_on_the_page_of_options():
    import cli

    alone = {"gen": "ple-gen", "score": "ple-score", "train": "ple-train"}
    commands = {alone.get(name, f"ple {name}") for name in cli.COMMANDS.keys() - {"baseline"}}
    assert made().COMMANDS.keys() == commands | {f"ple baseline {name}" for name in cli.baseline.commands}


@pytest.mark.parametrize("name", ["options.md", "architecture.svg"])
def test_what_is_made_from_the_code_is_up_to_date(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made().MADE[name](), "run python docs/make.py"
