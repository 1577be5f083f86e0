"""How the pages hang together: imports run one way, the training reads from few names, lines stay narrow."""
import ast
from graphlib import TopologicalSorter

from makers import ROOT

FOLDERS = ("support", "paper", "toy")
PATHS = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
PAGES = {}      # "train" or "support.cli" -> its syntax tree
for path in PATHS:
    PAGES[".".join(path.relative_to(ROOT).with_suffix("").parts)] = ast.parse(path.read_text())


def imports(page):
    """The pages that a page imports, anywhere in it -> the names that it takes from each."""
    taken = {}
    for node in ast.walk(PAGES[page]):
        if isinstance(node, ast.Import):
            taken |= {alias.name: set() for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            taken.setdefault(node.module, set()).update(alias.name for alias in node.names)
            taken |= {f"{node.module}.{alias.name}": set() for alias in node.names}     # if a page
    return {name: names for name, names in taken.items() if name in PAGES}


def test_there_is_one_order_in_which_each_page_imports_only_earlier_ones():
    assert {"lora", "train", "sample", "data", "model", "convert_ckpt", "support.cli"} <= PAGES.keys()
    TopologicalSorter({page: imports(page) for page in PAGES}).prepare()    # a CycleError names the pages


def test_the_paper_rests_on_the_method_and_the_toy_on_both():
    for page in PAGES:
        folder = page.partition(".")[0]
        beyond = {"paper": {"toy"}, "toy": set()}.get(folder, {"paper", "toy"})
        assert not {name for name in imports(page) if name.partition(".")[0] in beyond}, page


def functions_and_classes(tree):
    return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_train_has_few_names_in_main_and_few_pages_to_import():
    """What a reader has to know to follow train.py: at most 20 functions and classes of 7 pages."""
    pages, own = imports("train"), functions_and_classes(PAGES["train"])
    ours = set(own)
    for page, names in pages.items():
        ours |= names & functions_and_classes(PAGES[page]).keys()
    named = {node.id for node in ast.walk(own["main"]) if isinstance(node, ast.Name)} & ours
    assert len(named) <= 20, sorted(named)
    assert len(pages) <= 7, sorted(pages)


def test_no_line_is_wider_than_110_columns():
    for path in [*PATHS, *ROOT.glob("tests/**/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path.relative_to(ROOT)}:{number}"
