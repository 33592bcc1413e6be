"""The order of the packages: each imports only what stands above it in notebooks/helpers/README.md."""

import ast
from pathlib import Path

import pytest

HELPERS = Path(__file__).resolve().parents[1] / "notebooks" / "helpers"
ORDER = ("runtime", "study", "packing", "pipeline", "fetch", "evaluation", "training", "export", "xvision")


def find_imports(path):
    """Yields the packages of the helpers that a module imports from, other than its own."""
    depth = len(path.relative_to(HELPERS).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level < depth and not (node.module or "").startswith("helpers"), f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", sorted(HELPERS.rglob("*.py")), ids=lambda path: str(path.relative_to(HELPERS)))
def test_a_module_imports_only_from_packages_above_it(path):
    own = path.relative_to(HELPERS).parts[0].removesuffix(".py")
    for package in find_imports(path):
        assert ORDER.index(package) < ORDER.index(own), f"{own} may not import {package}"


def test_every_package_has_its_place_in_the_order():
    found = {path.name.removesuffix(".py") for path in HELPERS.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__"} == set(ORDER)
