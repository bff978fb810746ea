"""What our modules import: public names of other libraries only, and nothing heavy before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "mamtra_ray").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
INTERNALS = (
    "transformers.models",
    "transformers.masking_utils",
    "transformers.cache_utils",
    "transformers.modeling_rope_utils",
    "transformers.integrations",
    "ray._private",
    "ray._raylet",
    "torch._inductor",
    "torch._dynamo",
)


def imported_names(path):
    """Full names of all that a file imports, and of attributes reached through a module (``ray._private.worker``)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def test_no_module_is_built_on_internals_of_another_library():
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        for name in imported_names(path)
        if any(f"{name}.".startswith(f"{internal}.") for internal in INTERNALS)
    }
    assert not found


@pytest.mark.parametrize("package", ["models"])
def test_the_models_need_neither_transformers_nor_the_compiler(package):
    code = (
        "import importlib, pkgutil, sys\n"
        f"import mamtra_ray.{package} as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'{package.__name__}.{module.name}')\n"
        "print(*sorted({n for n in sys.modules if n.split('.')[0] in ('transformers', 'ray') or n == 'torch._dynamo'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_no_function_of_the_models_swallows_keywords():
    """A keyword that another library renames must end in an error, not in a state that is never kept."""
    swallowing = [
        f"{path.name}:{node.lineno} {node.name}(**{node.args.kwarg.arg})"
        for path in sorted((ROOT / "mamtra_ray" / "models").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None
    ]
    assert [entry.split()[1] for entry in swallowing] == ["write_model(**content)"]  # what goes into a JSON file
