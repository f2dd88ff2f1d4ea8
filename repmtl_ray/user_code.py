"""The user's own functions and classes: which code they are, where it lies, and where it failed.

Owns the identity of code, which results are kept under, the list of the user's modules that a
function needs, and what is said of an error in them. An identity depends on the source of the
function and of all that it reaches in the user's own modules: other functions, classes, constants.
It does not depend on comments, layout or docstrings, nor on lines of the script that the function
does not use, nor on the versions of installed packages.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import site
import sys
import sysconfig
import textwrap
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_OURS = "repmtl_ray"
_OUR_FOLDER = Path(__file__).resolve().parent


def identity(code: Any) -> str:
    """Twelve hexadecimal digits; equal for equal code.

    Args:
        code: a function, a class, an object with attributes, or containers of these.
    """
    walk = _Walk()
    walk.visit(code)
    return walk.digest.hexdigest()[:12]


def modules_of(code: Any) -> tuple[types.ModuleType, ...]:
    """The user's own modules that code needs, the script itself left out."""
    walk = _Walk()
    walk.visit(code)
    found = (sys.modules.get(name) for name in sorted(walk.modules - {"__main__"}))
    return tuple(module for module in found if module is not None)


def failure_of(error: BaseException) -> str:
    """An error in one line: its type, what it says, and the line of the user's code that it came
    from, as "KeyError: 'a' (script.py, line 7, in model)"."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".: ")[:300]
    site = _site_of(error)
    return f"{text} ({site})" if site else text


def is_from_user(error: BaseException) -> bool:
    """Whether an error came from the user's code, or from a library that this code called.

    Errors of the operating system are left out: of files and networks, another attempt may find
    other ones.
    """
    return not isinstance(error, OSError) and bool(_site_of(error))


def is_message(error: BaseException) -> bool:
    """Whether an error is one that this project raised itself, whose text is for users."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, ValueError)
        and bool(frames)
        and Path(frames[-1].filename).resolve().is_relative_to(_OUR_FOLDER)
    )


def _site_of(error: BaseException) -> str:
    """The innermost line that is in no installed package, if it is the user's; "" if it is ours."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith("<frozen"):
            continue
        path = Path(frame.filename).resolve()
        if path.is_relative_to(_OUR_FOLDER):
            return ""
        if not any(path.is_relative_to(folder) for folder in _installed_folders()):
            return f"{path.name}, line {frame.lineno}, in {frame.name}"
    return ""


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    folders = {*sysconfig.get_paths().values(), *site.getsitepackages()}
    folders.add(site.getusersitepackages())
    return tuple(Path(folder).resolve() for folder in folders)


@functools.cache
def _is_users(module: str) -> bool:
    """Whether a module is the user's: no part of Python, of an installed package or of this one."""
    top = module.partition(".")[0]
    if top == "__main__":
        return True
    if top == _OURS or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return False
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if loaded is not None and file is None:
        return False
    if file is None:  # it came by value from another process
        return True
    path = Path(file).resolve()
    return not any(path.is_relative_to(folder) for folder in _installed_folders())


class _Walk:
    """Visits everything that code reaches, once, and feeds it to a digest."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.modules: set[str] = set()
        self._seen: dict[int, Any] = {}

    def feed(self, *texts: object) -> None:
        for text in texts:
            self.digest.update(f"{text}\0".encode())

    def visit(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self.feed(type(value).__name__, repr(value))
            return
        if id(value) in self._seen:
            self.feed("seen")
            return
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self._module(value)
        elif isinstance(value, types.MethodType):
            self.visit(value.__func__)
            self.visit(value.__self__)
        elif isinstance(value, functools.partial):
            self.feed("partial")
            self.visit([value.func, value.args, value.keywords])
        elif isinstance(value, Mapping):
            self.feed("mapping", len(value))
            for key, item in value.items():
                self.visit(key)
                self.visit(item)
        elif isinstance(value, list | tuple):
            self.feed("sequence", len(value))
            for item in value:
                self.visit(item)
        elif isinstance(value, set | frozenset):
            self.feed("set", sorted(map(repr, value)))
        else:
            self._object(value)

    def _function(self, function: types.FunctionType) -> None:
        self.feed("function", function.__qualname__)
        if not _is_users(function.__module__ or "__main__"):
            self.feed(function.__module__)
            return
        self.modules.add(function.__module__ or "__main__")
        self.feed(_source_of(function))
        self.visit([function.__defaults__, function.__kwdefaults__])
        for name in sorted(_names_in(function.__code__)):
            if name in function.__globals__:
                self.feed(name)
                self.visit(function.__globals__[name])
        for cell in function.__closure__ or ():
            try:
                self.visit(cell.cell_contents)
            except ValueError:  # a variable that has no value yet
                self.feed("empty cell")

    def _class(self, cls: type) -> None:
        self.feed("class", cls.__qualname__)
        if not _is_users(cls.__module__):
            self.feed(cls.__module__)
            return
        self.modules.add(cls.__module__)
        self.feed(_source_of(cls))
        for base in cls.__bases__:
            self.visit(base)
        for _, value in sorted(vars(cls).items()):
            for function in _functions_of(value):
                self.visit(function)

    def _module(self, module: types.ModuleType) -> None:
        self.feed("module", module.__name__)
        if _is_users(module.__name__):
            self.modules.add(module.__name__)
            self.feed(_without_layout(Path(str(module.__file__)).read_text(encoding="utf-8")))
            for _, value in sorted(vars(module).items()):
                if isinstance(value, types.FunctionType | type | types.ModuleType):
                    self.visit(value)

    def _object(self, value: Any) -> None:
        cls = type(value)
        self.visit(cls)
        if hasattr(value, "detach") and hasattr(value, "numpy"):  # a tensor
            value = value.detach().cpu().numpy()
        if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array
            self.feed(value.dtype, getattr(value, "shape", ()))
            self.digest.update(value.tobytes())
        elif cls.__module__.partition(".")[0] == _OURS or _is_users(cls.__module__):
            self.visit(getattr(value, "__dict__", {}))
        elif hasattr(value, "_parameters") and hasattr(value, "_modules"):  # a module of PyTorch
            self.visit({k: v for k, v in vars(value).items() if not k.endswith("_hooks")})


def _functions_of(value: Any) -> Iterator[Any]:
    """The functions that an attribute of a class stands for."""
    if isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, property):
        yield from (part for part in (value.fget, value.fset) if part is not None)
    elif isinstance(value, types.FunctionType):
        yield value


def _names_in(code: types.CodeType) -> set[str]:
    """The global names that code and the functions inside it look up; no names of attributes, which a
    copy in another process does not bring along."""
    found = dis.get_instructions(code)
    names = {part.argval for part in found if part.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _source_of(code: Any) -> str:
    """The source without layout; of code that has none (typed at a prompt), the compiled form."""
    try:
        return _without_layout(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError):
        if not isinstance(code, types.FunctionType):
            return ""  # its methods are visited
        return _compiled(code.__code__)


def _compiled(code: types.CodeType) -> str:
    parts = [
        _compiled(part) if isinstance(part, types.CodeType) else repr(part)
        for part in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {parts}"


def _without_layout(source: str) -> str:
    """Source as its syntax tree, without docstrings; as it is where a part makes no tree."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a lambda inside a call
        return source
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            constant = body[0].value
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                constant.value = ""
    return ast.dump(tree)
