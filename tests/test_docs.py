import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path
from textwrap import dedent

import pytest

from skdim import DIMTransformer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# A block with an option, a caption say, needs more than the tests have, and is not run.
BLOCK = re.compile(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", flags=re.MULTILINE)
PAGES = [path for path in sorted(DOCS.glob("*.rst")) if BLOCK.search(path.read_text())]
PUBLIC = ["skdim"] + [
    f"skdim.{name}" for name in ("discriminators", "displays", "encoders", "evaluation", "files", "objectives", "views")
]
SOURCES = sorted((ROOT / "skdim").rglob("*.py"))
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES if ">>> " in path.read_text()
]

# A docstring may lack an extended summary, See Also and Examples, and one of a single line all sections.
OPTIONAL = {"ES01", "SA01", "EX01"}
SECTIONS = {"PR01", "RT01"}


def public_docstrings():
    """Yield the names of all public classes and functions, and of the methods that are their own, with docstrings."""
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{module.__name__}.{name}", thing.__doc__
            for method, function in vars(thing).items() if inspect.isclass(thing) else ():
                if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                    yield f"{module.__name__}.{name}.{method}", function.__doc__


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_code_on_a_page_of_the_guide_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCK.findall(path.read_text()):
        exec(dedent(block), names)


def test_the_guide_explains_every_parameter():
    explained = set(re.findall(r"``(\w+)``", (DOCS / "parameters.rst").read_text()))
    assert set(inspect.signature(DIMTransformer).parameters) <= explained


def test_the_map_of_the_code_shows_which_module_imports_which():
    (text,) = re.findall(r"^```text\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    line_of = {name: n for n, line in enumerate(text.splitlines()) for name in re.findall(r"(\w+)(?:\.py|/)", line)}
    imports = {}
    for source in SOURCES:
        module = source.relative_to(ROOT / "skdim").parts[0].removesuffix(".py")
        found = re.findall(r"^ *(?:from|import) skdim\.(\w+)", source.read_text(), re.MULTILINE)
        imports.setdefault(module, set()).update(set(found) - {module, "_version"})
    assert line_of.keys() == imports.keys() - {"__init__", "_version"}
    upwards = [(module, name) for module, n in line_of.items() for name in imports[module] if line_of[name] <= n]
    assert not upwards


def test_public_docstrings_are_numpydoc():
    validate = pytest.importorskip("numpydoc.validate").validate
    faults = [
        (name, code, message)
        for name, docstring in public_docstrings()
        for code, message in validate(name)["errors"]
        if code not in OPTIONAL and not (code in SECTIONS and ("\n" not in docstring.strip() or "*args" in message))
    ]
    assert not faults


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted
    assert not results.failed


def test_documented_defaults_are_the_defaults():
    n_compared = 0
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            thing = getattr(module, name)
            if not (inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, Exception))):
                continue
            signature = inspect.signature(thing).parameters
            for names, text in re.findall(r"^ *(\w+(?:, \w+)*) : .*\bdefault=(.+)$", thing.__doc__, re.MULTILINE):
                values = text.split(" and ") if ", " in names else [text]
                for parameter, value in zip(names.split(", "), values, strict=True):
                    try:
                        documented = ast.literal_eval(value)
                    except (SyntaxError, ValueError):
                        continue  # "all of them", for one
                    assert signature[parameter].default == documented, f"{name}: {parameter}"
                    n_compared += 1
    assert n_compared > 60
