"""`ouro_vllm.compat`: small made-up vLLMs, and the installed one."""

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ouro_vllm import compat

VLLM = {
    "vllm/__init__.py": """
raise SystemExit("vLLM must be read, not imported")
from .version import __version__
if TYPE_CHECKING:
    from vllm.hidden import ForCheckers
LAZY = {"Engine": ".engine:Engine"}
def __getattr__(name): ...
""",
    "vllm/version.py": "__version__ = '1.0'\n",
    "vllm/context.py": """
@dataclass
class Context:
    layers: dict
    slots: dict
    unread: int = 0
@contextmanager
def override(context, *, quiet=False):
    yield context
def current() -> Context:
    '''The one that was set.'''
    return _context
""",
    "vllm/layers/__init__.py": "from .linear import Linear as Linear\nfrom ._more import *\n",
    "vllm/layers/linear.py": """
from vllm.layers._base import Layer
class Linear(Layer):
    def __init__(self, size: int, bias: bool = True, *, prefix: str = "") -> None:
        self.size = size
    def forward(self, x): ...
    def load(self, weights, *, mapper=None): ...
""",
    "vllm/layers/_base.py": "class Layer(nn.Module):\n    def tie(self, other): ...\n",
    "vllm/layers/_more.py": "def helper(a, b=1, *rest, **others): ...\n_hidden = 1\n",
    "vllm/registry.py": """
class _Registry:
    def register(self, mode, module, name): ...
REGISTRY = _Registry()
HOOKS: dict[str, type] = {}
try:
    from vllm.nowhere import fast
except ImportError:
    def fast(): ...
""",
    "vllm/render.py": "class Renderer:\n    def __init__(self, config): ...\n",
    "vllm/entry.py": "def serve(): ...\n",
    "vllm/tokens.py": """
class TokenizerLike(Protocol):
    @classmethod
    def load(cls, path): ...
""",
}
PLUGIN = """
from typing import TYPE_CHECKING
import vllm
import vllm.registry as registry
from vllm.layers import Linear, helper
from vllm.tokens import TokenizerLike
if TYPE_CHECKING:
    from vllm.context import Context
def install():
    from vllm import Engine
    from vllm.context import current, override
    registry.REGISTRY.register("ours", "vllm.render", "Renderer")
    registry.HOOKS["ours"] = vllm.__version__
    layer = Linear(3)
    layer.load([], mapper=None)
    layer.tie(layer.size)
    with override(current()) as context:
        return context.layers, replace(context, slots={})
class Tokenizer(TokenizerLike):
    @classmethod
    def load(cls, path): ...
COMMAND = ["python", "-m", "vllm.entry"]
"""
NAMES = {
    ("vllm", "Engine"),
    ("vllm", "__version__"),
    ("vllm", "entry"),
    ("vllm", "registry"),
    ("vllm.context", "Context"),
    ("vllm.context", "current"),
    ("vllm.context", "override"),
    ("vllm.layers", "Linear"),
    ("vllm.layers", "helper"),
    ("vllm.registry", "HOOKS"),
    ("vllm.registry", "REGISTRY"),
    ("vllm.render", "Renderer"),
    ("vllm.tokens", "TokenizerLike"),
}
Compare = Callable[..., tuple[int, list[str]]]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def wheel(file: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in {**files, "vllm-1.0.dist-info/METADATA": "Name: vllm\n"}.items():
            archive.writestr(name, text)
    return file


def uses_of(folder: Path) -> compat.Uses:
    return compat.scan(write(folder, {"plugin.py": PLUGIN}).glob("*.py"))


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Compare VLLM with VLLM after replacing text in one file: (file, old, new, ...) -> status, printed lines."""

    def run(*change: str, uses: compat.Uses | None = None, zipped: bool = False) -> tuple[int, list[str]]:
        files = dict(VLLM)
        for name, old, new in zip(change[::3], change[1::3], change[2::3], strict=True):
            assert old in files[name]
            files[name] = files[name].replace(old, new)
        old_tree = write(tmp_path / "old", VLLM)
        new_tree = wheel(tmp_path / "new.whl", files) if zipped else write(tmp_path / "new", files)
        status = compat.check(new_tree, old_tree, uses or uses_of(tmp_path / "plugin"))
        return status, capsys.readouterr().out.splitlines()

    return run


def line(lines: list[str], name: str) -> str:
    """The one line on a name, with single spaces."""
    (found,) = [" ".join(text.split()) for text in lines if text.split()[1].rstrip(":") == name]
    return found


def test_scan_finds_every_kind_of_use(tmp_path: Path) -> None:
    uses = uses_of(tmp_path)
    assert uses.names == NAMES
    assert uses.replaced == {("vllm.tokens", "TokenizerLike")}
    assert {"load", "mapper", "tie", "size", "layers", "slots"} <= uses.mentioned
    assert not {"unread", "prefix", "quiet"} & uses.mentioned


@pytest.mark.parametrize("zipped", [False, True])
def test_same_tree_fits_as_folder_and_as_wheel(compare: Compare, zipped: bool) -> None:
    status, lines = compare(zipped=zipped)
    assert status == 0
    assert [text.split()[0] for text in lines[:-1]] == ["same"] * len(NAMES)
    assert lines[-1].endswith(f"{len(NAMES)} names: {len(NAMES)} same, 0 compatible, 0 changed, 0 missing.")
    assert "lazy" in line(lines, "vllm.Engine")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("vllm/layers/__init__.py", "Linear as Linear", "Linear as Dense"), "missing vllm.layers.Linear"),
        (("vllm/layers/__init__.py", "._more", "._base"), "missing vllm.layers.helper"),
        (("vllm/context.py", "def current()", "def now()"), "missing vllm.context.current"),
        (("vllm/__init__.py", '"Engine"', '"Motor"'), "missing vllm.Engine"),
        (
            ("vllm/layers/linear.py", "mapper=None", "renames=None"),
            "changed vllm.layers.Linear: load(self, weights, *, mapper=None) -> (self, weights, *, renames=None)",
        ),
        (("vllm/layers/_more.py", "b=1", "c=1"), "changed vllm.layers.helper: (a, b=1, *rest, **others) -> "),
        (("vllm/layers/_more.py", "b=1", "b"), "changed vllm.layers.helper: "),
        (("vllm/layers/_more.py", ", **others", ""), "changed vllm.layers.helper: "),
        (("vllm/layers/_more.py", "b=1,", "b=1, c=2,"), "changed vllm.layers.helper: "),
        (
            ("vllm/layers/linear.py", "bias: bool = True, *,", "*, bias: bool = True,"),
            "changed vllm.layers.Linear: __init__(",
        ),
        (("vllm/layers/linear.py", "size: int,", "size: int, rank: int,"), "changed vllm.layers.Linear: __init__("),
        (("vllm/layers/linear.py", "forward(self, x)", "forward(self, x, y)"), "changed vllm.layers.Linear: forward("),
        (("vllm/layers/linear.py", "    def forward", "    async def forward"), "changed vllm.layers.Linear: forward("),
        (("vllm/layers/linear.py", "self.size", "self.length"), "changed vllm.layers.Linear: size attribute -> gone"),
        (
            ("vllm/layers/linear.py", "class Linear(Layer)", "class Linear(Layer, Mixin)"),
            "changed vllm.layers.Linear: bases Layer -> Layer Mixin",
        ),
        (("vllm/layers/_base.py", "tie(self, other)", "tie_to(self, other)"), "changed vllm.layers.Linear: tie(self, "),
        (
            ("vllm/context.py", "    slots: dict\n", ""),
            "changed vllm.context.Context: slots field without default -> gone",
        ),
        (
            ("vllm/context.py", "    unread", "    more: int\n    unread"),
            "changed vllm.context.Context: more none -> field without default",
        ),
        (("vllm/context.py", "@contextmanager\n", ""), "changed vllm.context.override: contextmanager(context, "),
        (
            ("vllm/registry.py", "mode, module, name", "mode, path"),
            "changed vllm.registry.REGISTRY: register(self, mode, module, name) -> (self, mode, path)",
        ),
        (("vllm/registry.py", "= {}", "= Table()"), "changed vllm.registry.HOOKS: Dict -> Table"),
        (
            ("vllm/tokens.py", "cls, path", "cls, path, revision=None"),
            "changed vllm.tokens.TokenizerLike: load classmethod(cls, path) -> classmethod(cls, path, revision=None)",
        ),
    ],
)
def test_what_breaks_the_plugin_is_reported(compare: Compare, change: tuple[str, ...], expected: str) -> None:
    status, lines = compare(*change)
    assert status == 1
    assert line(lines, expected.split()[1].rstrip(":")).startswith(expected)
    others = [text for text in lines[:-1] if text.split()[0] != "same"]
    assert len(others) == 1 or [text.split()[1] for text in others] == ["vllm.registry:", "vllm.registry.HOOKS:"]
    assert "does not fit" in lines[-1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("vllm/layers/linear.py", "bias: bool = True", "bias: bool = True, rank: int = 0"), "vllm.layers.Linear"),
        (("vllm/layers/linear.py", "mapper=None", "mapper=None, strict=True"), "vllm.layers.Linear"),
        (("vllm/context.py", "quiet=False", "quiet=True"), "vllm.context.override"),
        (("vllm/context.py", "    unread: int = 0\n", ""), "vllm.context.Context"),
    ],
)
def test_what_all_calls_survive_is_compatible(compare: Compare, change: tuple[str, ...], name: str) -> None:
    status, lines = compare(*change, zipped=True)
    assert status == 0
    assert line(lines, name).startswith(f"compatible {name}: ")
    assert lines[-1].endswith(f"{len(NAMES) - 1} same, 1 compatible, 0 changed, 0 missing.")


@pytest.mark.parametrize(
    "change",
    [
        ("vllm/context.py", "-> Context", "-> 'Context | None'"),
        ("vllm/context.py", "unread: int = 0", "unread: int = 0\n    more: int = 0"),
        ("vllm/layers/_more.py", "_hidden = 1", "_hidden = 2\ndef another(): ..."),
        ("vllm/registry.py", "_Registry", "_ModeRegistry"),
        ("vllm/layers/linear.py", "class Linear(Layer):", "class Linear(Layer[int]):"),
    ],
)
def test_what_cannot_matter_stays_the_same(compare: Compare, change: tuple[str, ...]) -> None:
    status, lines = compare(*change)
    assert status == 0
    assert "0 compatible, 0 changed" in lines[-1]


def test_moved_definition_is_followed(compare: Compare) -> None:
    moved = VLLM["vllm/context.py"]
    status, lines = compare(
        *("vllm/context.py", moved, "from .entry import Context, current, override\n"),
        *("vllm/entry.py", "def serve(): ...\n", moved),
    )
    assert status == 0
    assert "0 compatible, 0 changed" in lines[-1]


def test_required_members_and_insides(compare: Compare, tmp_path: Path) -> None:
    uses = uses_of(tmp_path / "plugin")
    uses.reads["vllm.context", "Context"] = {"unread"}
    uses.names.add(("vllm", "context"))
    uses.insides["vllm", "context"] = {"current"}
    status, lines = compare("vllm/context.py", "return _context", "return None", uses=uses)
    assert status == 0
    assert line(lines, "vllm.context") == "same vllm.context: current differs inside: read it"
    status, lines = compare("vllm/context.py", "The one that", "That", "vllm/context.py", "unread", "unused", uses=uses)
    assert status == 1
    assert line(lines, "vllm.context") == "same vllm.context"
    assert line(lines, "vllm.context.Context") == "changed vllm.context.Context: unread field -> gone"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda f: f / "none.whl", "no such file or folder. Give a vLLM wheel"),
        (lambda f: write(f, {"text.whl": "text"}) / "text.whl", "is not a wheel"),
        (lambda f: write(f, {"other/__init__.py": ""}), "has no vllm/__init__.py. Give a vLLM wheel"),
        (lambda f: wheel(f / "other.whl", {"other/__init__.py": ""}), "has no vllm/__init__.py. Give a vLLM wheel"),
        (lambda f: write(f, {"vllm/__init__.py": "type =="}), "line 1: cannot be parsed. Run this with a newer Python"),
    ],
)
def test_bad_input_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: Callable[[Path], Path], message: str
) -> None:
    assert compat.main([str(given(tmp_path)), "--against", str(write(tmp_path / "old", VLLM))]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_without_an_installed_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compat.main([str(tmp_path)]) == 2
    assert "Name one that is known to work with --against." in capsys.readouterr().err


def test_sources_without_vllm_are_refused(tmp_path: Path) -> None:
    with pytest.raises(compat.BadInput, match="no source that uses vLLM"):
        compat.plugin_uses(write(tmp_path, {"ouro_vllm/empty.py": "import os\n"}) / "ouro_vllm")


def test_plugin_uses_are_found() -> None:
    uses = compat.plugin_uses()
    assert uses.names >= {
        ("vllm.forward_context", "override_forward_context"),
        ("vllm.model_executor.models.registry", "ModelRegistry"),
        ("vllm.renderers.hf", "HfRenderer"),
        ("vllm.config", "VllmConfig"),
        ("vllm", "__version_tuple__"),
    }
    assert uses.replaced >= {("vllm.tokenizers.protocol", "TokenizerLike")}
    assert {"load_weights", "orig_to_new_stacked", "register_model"} <= uses.mentioned


def test_tables_name_nothing_that_the_plugin_does_not() -> None:
    folder = Path(compat.__file__).parent
    sources = "".join(file.read_text() for file in folder.rglob("*.py") if file != Path(compat.__file__))
    members = " ".join([*compat.READS.values(), *compat.STANDS_FOR.values()]).split()
    assert len(members) > 20
    assert [member for member in members if member not in sources] == []


def test_installed_vllm_fits_itself(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(importlib.util.find_spec("vllm").origin).parents[1]
    names = [".".join(name) for name in sorted(compat.plugin_uses().names)]
    assert compat.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [text.replace(":", "").split()[:2] for text in lines[:-1]] == [["same", name] for name in names]
    assert "vllm.forward_context.override_forward_context" in names and len(names) > 40
