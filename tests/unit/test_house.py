"""Rules of the house that a reader could break without noticing."""

import ast
import re
import sys
from collections.abc import Collection, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ["pretrain", "downstream", "recipes"]
RECIPES = [p.stem for p in (ROOT / "recipes").glob("[a-z]*.py")]
FILES = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]


@cache
def parsed(source: str) -> ast.Module:
    """The tree of a module, which several tests look at."""
    return ast.parse(source)


@pytest.fixture(scope="module", autouse=True)
def trees_are_freed() -> Iterator[None]:
    yield
    parsed.cache_clear()


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_imports_point_one_way():
    for path in FILES:
        room = path.relative_to(ROOT).parts[0]
        later = set(ROOMS[ROOMS.index(room) + 1 :])
        assert not imported(parsed(path.read_text())) & later, path
        # demo.py shows what others do, and copies none of it.
        if room == "recipes" and path.name != "demo.py":
            assert not edges(path.read_text(), {*map("recipes.{}".format, RECIPES)}), path


def test_recipes_say_how_threads_wait_before_torch_is_loaded():
    for path in sorted((ROOT / "recipes").glob("[a-z]*.py")):
        first = [
            name
            for node in parsed(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            )
            if name and name.split(".")[0] not in sys.stdlib_module_names
        ]
        if path.stem not in ("compare", "pack"):  # which compute nothing
            assert first[0] == "pretrain.threads", path


def modules() -> dict[str, Path]:
    """The modules of the three rooms, by dotted name."""
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def edges(source: str, known: Collection[str]) -> set[str]:
    """The modules among `known` that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported from a package may be a module of it, or stand in its __init__.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & set(known)


def circle(graph: dict[str, set[str]]) -> str:
    """A chain of imports that ends where it began; nothing if there is none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


def test_no_import_goes_in_a_circle():
    known = modules()
    assert {"pretrain.backbones", "downstream.models", "recipes.clip"} <= known.keys()
    graph = {name: edges(path.read_text(), known) - {name} for name, path in known.items()}
    assert sum(map(len, graph.values())) > 100
    assert not circle(graph)


def test_a_circle_is_noticed():
    known = {"a", "a.b", "a.c"}
    sources = {"a": "from a.b import x", "a.b": "from a import c", "a.c": "def f():\n    import a"}
    graph = {name: edges(source, known) for name, source in sources.items()}
    assert circle(graph).count("a.c") == 1
    assert not circle(graph | {"a.c": edges("import b\nfrom . import x", known)})


PICKLES = {"pickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "pickle5"}
RUNS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load",
    "yaml.unsafe_load", "torch.jit.load", "torch.export.load", "torch.package.PackageImporter",
}  # fmt: skip
# What a keyword of these names may say; nothing else, and no variable.
SAFE = {
    "shell": "False",
    "allow_pickle": "False",
    "weights_only": "True",
    "trust_remote_code": "False",
}


def dangers(source: str, name: str) -> list[str]:
    """What of a module could run code out of a file, as code."""
    tree = parsed(source)
    found = sorted(imported(tree) & PICKLES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            words = {k.arg: ast.unparse(k.value) for k in node.keywords}
            unsafe = any(words.get(word, value) != value for word, value in SAFE.items())
            loads = called == "torch.load" and (name != "weights.py" or "weights_only" not in words)
            unpacks = called.endswith((".extractall", ".extract", ".unpack_archive"))
            if called in RUNS or unsafe or loads or unpacks:
                found.append(ast.unparse(node))
    return found


def test_nothing_dangerous():
    for path in FILES:
        assert not dangers(path.read_text(), path.name), path


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import numpy, dill", "torch.load(f)",
        "torch.load(f, weights_only=True)", "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)", "f(trust_remote_code=True)", "f(trust_remote_code=given)",
        "run(c, shell=True)", "eval(x)", "exec(x)", "archive.extractall(o)", "yaml.load(f)",
        "os.system(c)", "torch.jit.load(f)",
    ],
)  # fmt: skip
def test_a_danger_is_noticed(source):
    assert dangers(source, "else.py")
    assert not dangers("torch.load(f, weights_only=True)", "weights.py")
    assert dangers("torch.load(f)", "weights.py") and not dangers(
        "f(trust_remote_code=False)", "a.py"
    )


# What makes a network, a configuration or a tokenizer of a name, or fetches a file by one.
FACTORIES = {
    "create_model", "get_tokenizer", "CustomTextCLIP", "CLIP", "CoCa", "get_model",
    "get_model_config", "from_pretrained", "from_config", "for_model", "get_config_dict",
    "hf_hub_download", "snapshot_download", "cached_download", "load_state_dict_from_url",
    "download_url_to_file", "urlopen", "urlretrieve", "import_module", "pipeline",
    "load_checkpoint_from_pretrained", "get_weight", "create_model_and_transforms",
    "create_model_from_pretrained",
}  # fmt: skip


def factory_calls(source: str) -> set[str]:
    calls = [n for n in ast.walk(parsed(source)) if isinstance(n, ast.Call)]
    called = {ast.unparse(n.func) for n in calls}
    return {c for c in called if c.split(".")[-1] in FACTORIES or c.startswith("torch.hub.")}


def test_one_module_calls_the_factories_of_others():
    """And refuses remote code wherever there could be some."""
    for path in FILES:
        calls = factory_calls(path.read_text()) if path.name != "third_party.py" else set()
        ours = {"import_module"} if path == ROOT / "recipes/__main__.py" else set()
        assert calls == ours, path
    source = (ROOT / "pretrain/third_party.py").read_text()
    known = {"timm.create_model", "AutoModel.from_pretrained", "AutoTokenizer.from_pretrained"}
    assert known <= factory_calls(source)
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("Auto"):
            words = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert words.get("trust_remote_code") == "False", node.lineno


def test_a_factory_elsewhere_is_noticed():
    assert factory_calls("import timm\nnet = timm.create_model(name)") == {"timm.create_model"}
    assert factory_calls("torch.hub.load(a, b)") and not factory_calls("timm.list_models()")


def test_top_level_holds_what_it_should():
    allowed = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "launch", "tests", *ROOMS}
    extra = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")} - allowed
    assert not {n for n in extra if not n.endswith(".egg-info") and n not in ("runs", "build")}


def test_no_result_depends_on_a_figure():
    """Whatever draws with matplotlib is `optional_figure`: it warns, and the numbers stay."""
    for path in FILES:
        text = path.read_text()
        for node in ast.walk(parsed(text)) if "figure.savefig(" in text else ():
            if isinstance(node, ast.FunctionDef) and "figure.savefig(" in ast.unparse(node):
                decorators = [ast.unparse(d) for d in node.decorator_list]
                assert "optional_figure" in decorators, f"{path}: {node.name}"


def test_the_guide_to_the_tests_names_tests_that_exist():
    text = (ROOT / "tests" / "README.md").read_text()
    rows = re.findall(r"^\| ([A-D]\d+) \|.*\| (.*) \|$", text, re.MULTILINE)
    counts = {"A": 13, "B": 15, "C": 14, "D": 11}
    assert [r[0] for r in rows] == [f"{a}{i + 1}" for a, n in counts.items() for i in range(n)]
    for number, answer in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", answer)
        assert named or answer.startswith("not here"), number
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), (number, file, test)
    for word in re.findall(r"fuzz ((?:`\w+`(?:, )?)+)", text):
        names = set(re.findall(r"`(\w+)`", word))
        assert names <= set(
            re.findall(r'^    "(\w+)": Target', (ROOT / "tests/fuzz/targets.py").read_text(), re.M)
        ), names
    for word in ("SECURITY", "Trusted", "Not trusted", "Reporting", "Out of scope"):
        assert word in text


def test_no_function_is_over_100_lines():
    for path in FILES:
        for node in ast.walk(parsed(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 100, f"{path}: {node.name}"


def test_guides_have_no_line_over_100_columns():
    """But in tables, and words that cannot be broken; ruff looks at the Python."""
    rooms = (*ROOMS, "tests", "launch")
    for path in (*ROOT.glob("*.md"), *(p for room in rooms for p in (ROOT / room).rglob("*.md"))):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("|")]
        broken = [line for line in lines if max(map(len, line.split()), default=0) < 90]
        assert not [line for line in broken if len(line) > 100], path


def private_names(source: str) -> list[str]:
    """Names of ours that begin with _ and are imported, read or replaced by a test."""

    def private(name: str) -> bool:
        others = ("__", "_replace", "_asdict", "_typed_storage")  # Python's, torch's
        return name.startswith("_") and not name.startswith(others)

    def head(node: ast.AST) -> str:
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else ""

    tree, ours, theirs, found = parsed(source), set(), {"self", "cls"}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = getattr(node, "module", "") or alias.name
                name = (alias.asname or alias.name).split(".")[0]
                if module.split(".")[0] in ROOMS:
                    ours.add(name)
                    found += [alias.name] * private(alias.name)
                else:
                    theirs.add(name)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if private(name) and head(node) not in theirs:
                found.append(name)
            case ast.Call(
                func=ast.Attribute(attr="setattr"), args=[place, ast.Constant(str(name)), *_]
            ):
                found += [name] * (private(name) and head(place) in ours)
            case ast.Call(func=ast.Attribute(attr="setattr"), args=[ast.Constant(str(name)), *_]):
                room, *rest = name.split(".")
                found += [name] * (room in ROOMS and any(map(private, rest)))
    return found


def test_tests_reach_for_no_private_names():
    """What a test needs is public: else the inside could not be changed without the tests."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert not private_names(path.read_text()), path


@pytest.mark.parametrize(
    "line",
    ["from recipes.clip import _a", "from pretrain import log as l; l._a()",
     "import pretrain.log; pretrain.log._a",
     "from pretrain import log; patch.setattr(log, '_a', 1)", "patch.setattr('pretrain.log._a', 1)",
     "from pretrain.log import A; A.b._c", "from pretrain.log import f; x = f(); x._a()"],
)  # fmt: skip
def test_private_names_are_seen(line):
    assert private_names(line)
    assert not private_names(line.replace("_a", "a").replace("_c", "c").replace("log", "__doc__"))


# Our own words for what the field has a word for; none of them comes back.
OURS = [
    "so-and-so-manieth", "of the contract", "people never seen", "lets go of", "let go of",
    "nothing looks ahead", "collective's patience", "starting them honestly", "views found",
    "views_found", "penalty", "hare of ", "Keep of", "stands still", "told from", "told apart",
    "move most", "tokens that move", "weights of others", "another one's weights",
    "others' weights", "foreign", "nothing to tell apart", "Say no to", "SomeShare", "PartShare",
    "num_moving", "--moving", "--still", "make_world", "in world", "another world",
]  # fmt: skip


def test_the_fields_own_words():
    written = [
        *FILES,
        *ROOT.glob("*.md"),
        *(p for room in ROOMS for p in (ROOT / room).rglob("*.md")),
    ]
    texts = {p.relative_to(ROOT): p.read_text() for p in written if p.name != "CHANGELOG.md"}
    assert not [(str(p), words) for p, text in texts.items() for words in OURS if words in text]
