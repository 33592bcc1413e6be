"""The packages of the helpers: their order, what they offer, and that their README lists every module."""

import ast
import re
from pathlib import Path

import pytest

HELPERS = Path(__file__).resolve().parents[1] / "notebooks" / "helpers"
ORDER = [
    "runtime",
    "study",
    "packing",
    "augmentation",
    "pipeline",
    "fetch",
    "evaluation",
    "training",
    "export",
    "xvision",
]


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


def list_public(package):
    """Returns the names that a package's `__init__.py` imports for others."""
    nodes = ast.parse((HELPERS / package / "__init__.py").read_text()).body
    return [name.name for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names]


def test_what_a_package_offers_is_used_outside_the_helpers():
    root = HELPERS.parents[1]
    users = [*HELPERS.parent.glob("*.ipynb"), *(root / "docs").glob("*.md"), root / "models" / "README.md"]
    users += [path for folder in ("scripts", "serve", "benchmarks") for path in (root / folder).rglob("*.py")]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in users)))
    for package in ORDER:
        if (HELPERS / package).is_dir():
            unused = sorted(set(list_public(package)) - words)
            assert not unused, f"make these private or remove them from {package}/__init__.py: {unused}"


def test_the_readme_lists_every_module():
    modules = {str(path.relative_to(HELPERS)) for path in HELPERS.rglob("*.py") if not path.name.startswith("__")}
    links = set(re.findall(r"\]\(([\w/]+\.py)\)", (HELPERS / "README.md").read_text()))
    assert links == modules
