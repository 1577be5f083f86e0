"""What holds the pages in order: imports run one way, pages stay short, lines stay narrow."""
import ast

import pytest

from makers import ROOT

ORDER = ["cli", "model", "texts", "config", "lora", "paper.baselines", "files", "video", "data", "runs",
         "sample", "train", "convert_ckpt"]
LENGTHS = {"lora.py": 150, "train.py": 280, "sample.py": 280, "data.py": 160, "model.py": 560,
           "convert_ckpt.py": 240, "README.md": 150}
HERE = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}


def imported_pages(path):
    """The pages of this project that a page imports, anywhere in it: "model", "paper.baselines"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in HERE}


@pytest.mark.parametrize("page", ORDER)
def test_a_page_imports_only_pages_before_it(page):
    before = set(ORDER[:ORDER.index(page)])
    assert imported_pages(ROOT / f"{page.replace('.', '/')}.py") <= before


def test_every_page_has_its_place_in_the_order():
    assert {path.stem for path in ROOT.glob("*.py")} == {page for page in ORDER if "." not in page}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_page_keeps_its_length(name):
    lines = (ROOT / name).read_text().count("\n")
    assert lines <= LENGTHS[name]


def test_no_line_is_wider_than_110_columns():
    wide = []
    for folder in (ROOT, *(ROOT / name for name in ("paper", "toy", "tests", "tests/doors"))):
        for path in folder.glob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if len(line) > 110:
                    wide.append(f"{path.relative_to(ROOT)}:{number}")
    assert not wide
