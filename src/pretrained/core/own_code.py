# SPDX-License-Identifier: Apache-2.0
"""Architectures whose code lies beside the weights: ``auto_map`` of config.json, read and written.

Nothing here runs unless the caller was told to trust the code. What runs is known before the first line of
it does: the files that auto_map names and those that they import relatively are collected by reading, and
one set of bytes is what is collected, logged and executed. They become modules of a package whose name
comes from their content, so that two folders with a ``modeling.py`` each do not meet.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.abc
import importlib.util
import inspect
import keyword
import logging
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from pretrained.core.atomic_files import write_text_atomically
from pretrained.core.hub import Source, resolve
from pretrained.errors import ArgumentError, ConfigError, MissingDependencyError, did_you_mean

logger = logging.getLogger(__name__)

PACKAGE = "pretrained_own_code_"
"""What the names of the packages begin with that code from model folders is put into."""

MAX_FILES = 200
MAX_BYTES = 10_000_000

Fetch = Callable[[str], Path | None]


@dataclass(frozen=True, slots=True)
class CodeOptions:
    """What a call says about code that comes with a model.

    Attributes:
        trust: Run it.
        revision: Branch, tag or commit of the repository that holds it; None for the weights' own.
    """

    trust: bool = False
    revision: str | None = None

    @classmethod
    def take(cls, kwargs: MutableMapping[str, Any]) -> CodeOptions:
        """Take ``trust_remote_code`` and ``code_revision`` out of a call's keyword arguments.

        Args:
            kwargs: Changed in place.

        Raises:
            ArgumentError: a value of the wrong type.
        """
        trust, revision = kwargs.pop("trust_remote_code", None), kwargs.pop("code_revision", None)
        for name, value, kind, expected in (
            ("trust_remote_code", trust, bool, "True or False"),
            ("code_revision", revision, str, "a branch, tag or commit"),
        ):
            if value is not None and not isinstance(value, kind):
                raise ArgumentError(
                    f"{name} has a value of the wrong type",
                    where=name,
                    expected=expected,
                    found=f"{type(value).__name__} {value!r}"[:200],
                )
        return cls(bool(trust), revision)


@dataclass(frozen=True, slots=True)
class Reference:
    """An entry of auto_map: ``[repository--]module.Class``.

    Attributes:
        repository: Id of another repository that holds the file; None for the model's own.
        module: Dotted name of the file, below the folder.
        name: The class in it.
    """

    repository: str | None
    module: str
    name: str

    @property
    def file(self) -> str:
        """The file, relative to the folder."""
        return self.module.replace(".", "/") + ".py"


def read_reference(text: Any, where: object) -> Reference:
    """Read an entry of auto_map.

    Args:
        text: The entry.
        where: The file it is from, for errors.

    Raises:
        ConfigError: it is no such entry, or leaves the folder.
    """
    repository, mark, rest = text.rpartition("--") if isinstance(text, str) else ("", "", "")
    parts = rest.split(".")
    plain = all(part.isascii() and part.isidentifier() and not keyword.iskeyword(part) for part in parts)
    if len(parts) < 2 or not plain or (mark and not repository):
        raise ConfigError(
            "An entry of auto_map is not the name of a class in a file of the model's folder",
            where=where,
            expected="'file.Class', such as 'modeling_own.OwnModel'",
            found=repr(text)[:200],
            mend="Do not use this model, or correct its config.json.",
        )
    return Reference(repository or None, ".".join(parts[:-1]), parts[-1])


def refuse_code(text: Any, where: object, what: str) -> ConfigError:
    """Return the error for a model whose class is in a file that nobody has allowed to run.

    Args:
        text: The entry of auto_map.
        where: The file it is from.
        what: The Auto class that needs it.
    """
    reference = read_reference(text, where)
    holder = f" of {reference.repository}" if reference.repository else ""
    return ConfigError(
        f"{what} would have to run code that comes with this model, and was not told to",
        where=where,
        found=f"class {reference.name} in {reference.file}{holder}",
        mend="Read that file. If you trust it pass trust_remote_code=True, and for a repository its "
        "revision; or register classes of your own.",
    )


def load_class(source: Source, auto_map: Mapping[str, Any], key: str, options: CodeOptions) -> type[Any]:
    """Run the file that holds a class, and return the class.

    Args:
        source: Where the model's files are.
        auto_map: Of its config.json.
        key: Which entry: the name of an Auto class.
        options: What the call said; its trust has been asked.

    Raises:
        ConfigError: the entry leaves the folder, the file has no such class, or its code fails.
        FileError: there is no such file.
        ArgumentError: a repository, and no revision of it.
        MissingDependencyError: the code imports a package that is not installed.
    """
    assert options.trust
    where = f"{source}, auto_map"
    wanted = read_reference(auto_map[key], where)
    code = _source_of_code(source, wanted, options)
    # The config's file and the model's become one package, so that they mean the same classes.
    modules = {wanted.module: None}
    for name, text in auto_map.items():
        if name == "AutoConfig" or name.startswith("AutoModel"):
            other = read_reference(text, where)
            if other.repository == wanted.repository and code.file(other.file, required=False) is not None:
                modules[other.module] = None
    code.require(wanted.file)
    files = collect(lambda name: code.file(name, required=False), list(modules))
    package = _package(files)
    logger.warning(
        "trust_remote_code: running %s of %s%s for %s",
        ", ".join(sorted(str(path.name) for path, _ in files.values())),
        code.name if code.kind == "hub" else code.folder.absolute(),
        f" at {code.commit}" if code.commit else "",
        wanted.name,
    )
    found = getattr(_import(package, wanted, files), wanted.name, None)
    if not isinstance(found, type):
        raise ConfigError(
            f"{wanted.file} has no class {wanted.name}", where=where, mend="Correct auto_map in config.json."
        )
    register = getattr(found, "register_for_auto_class", None)
    if not issubclass(found, AutoClassMixin) or register is None:
        bases = ", ".join(sorted({base.__module__.partition(".")[0] for base in found.__mro__[1:-1]}))
        raise ConfigError(
            f"{wanted.name} is not a class of this library",
            where=f"{code.folder / wanted.file}",
            expected="one that derives from pretrained's PreTrainedConfig or PreTrainedModel",
            found=f"one that derives from classes of {bases or 'nothing'}",
            mend="It was written for another library; change its imports.",
        )
    register(key)
    return found


def load_function(source: Source, file: str, name: str, options: CodeOptions) -> Callable[..., Any]:
    """Run a file of a folder or repository, and return a function of it.

    Args:
        source: Where the file is.
        file: Its name, relative to the folder.
        name: The function.
        options: What the call said.

    Raises:
        ConfigError: the call did not trust the code, it fails, or has no such function.
        FileError: there is no such file.
        ArgumentError: a repository, and no revision of it.
        MissingDependencyError: the code imports a package that is not installed.
    """
    wanted = Reference(None, file.removesuffix(".py").replace("/", "."), name)
    if not options.trust:
        raise ConfigError(
            f"{name} would have to run code that comes with {source}, and was not told to",
            where=f"{source}, {file}",
            found=f"function {name} in {file}",
            mend="Read that file. If you trust it pass trust_remote_code=True, and for a repository its "
            "revision.",
        )
    code = _source_of_code(source, wanted, options)
    code.require(file)
    files = collect(lambda path: code.file(path, required=False), [wanted.module])
    logger.warning(
        "trust_remote_code: running %s of %s%s for %s",
        ", ".join(sorted(path.name for path, _ in files.values())),
        code.name if code.kind == "hub" else code.folder.absolute(),
        f" at {code.commit}" if code.commit else "",
        name,
    )
    function = getattr(_import(_package(files), wanted, files), name, None)
    if not callable(function):
        raise ConfigError(
            f"{file} has no function {name}", where=str(source), mend=f"Write def {name}(model, ...) in it."
        )
    found: Callable[..., Any] = function
    return found


def _source_of_code(source: Source, reference: Reference, options: CodeOptions) -> Source:
    """Return where the file of a reference is, having asked for the version that was read."""
    if reference.repository is not None:
        revision = options.revision or "main"
        source = resolve(reference.repository, replace(source.options, revision=revision, subfolder=""))
    elif options.revision is not None:
        if source.kind != "hub":
            raise ArgumentError(
                "code_revision is for code in a repository, and this model's is in a local folder",
                where="code_revision",
                found=str(source),
                mend="Leave it out.",
            )
        source = resolve(source.name, replace(source.options, revision=options.revision))
    if source.kind == "hub" and source.options.revision == "main":
        argument = "code_revision" if reference.repository else "revision"
        raise ArgumentError(
            "Code of a repository runs only at a revision that you name, because the repository may change",
            where=f"{source.name}, {reference.file}",
            expected=f"{argument}= a commit or a tag",
            mend=f"Read the file there; what it holds now is {argument}={source.commit!r}.",
        )
    return source


def collect(fetch: Fetch, modules: list[str]) -> dict[str, tuple[Path, bytes]]:
    """Return the files of some modules and of all that they import relatively, without running any.

    Args:
        fetch: Returns the path of a file by its name relative to the folder, or None.
        modules: Dotted names.

    Returns:
        Dotted name -> the file and its content. The name of a package is that of its folder.

    Raises:
        ConfigError: a file is no Python, imports from above the folder, or there are too many.
    """
    found: dict[str, tuple[Path, bytes]] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or not module:
            continue
        name = module.replace(".", "/")
        path = fetch(f"{name}.py") or fetch(f"{name}/__init__.py")
        if path is None:
            continue  # a name inside a module, or a file that its importer can do without
        content = path.read_bytes()
        found[module] = (path, content)
        if len(found) > MAX_FILES or sum(len(content) for _, content in found.values()) > MAX_BYTES:
            raise ConfigError(
                "The code of this model is too large", where=path, expected=f"{MAX_FILES} files"
            )
        is_package = path.name == "__init__.py"
        waiting += _relative_imports(path, content, module if is_package else module.rpartition(".")[0])
        waiting.append(module.rpartition(".")[0])
    return found


def _relative_imports(path: Path, content: bytes, package: str) -> list[str]:
    """Return what a file imports from its own folder, as dotted names; they need not exist."""
    try:
        tree = ast.parse(content, str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            "A file of the model's code is not Python", where=path, found=str(error)[:200]
        ) from error
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = package.split(".") if package else []
        if node.level - 1 > len(parts):
            raise ConfigError(
                "A file of the model's code imports from above its folder",
                where=f"{path}, line {node.lineno}",
                found=f"from {'.' * node.level}{node.module or ''} import ...",
                mend="Put what it needs beside it.",
            )
        base = [*parts[: len(parts) - (node.level - 1)], *(node.module or "").split(".")]
        base = [part for part in base if part]
        found.append(".".join(base))
        found += [".".join([*base, alias.name]) for alias in node.names if alias.name != "*"]
    return [name for name in found if name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the collected modules of one package, and nothing else."""

    def __init__(self, package: str, files: Mapping[str, tuple[Path, bytes]]) -> None:
        self.package = package
        self._files = {f"{package}.{module}": file for module, file in files.items()}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Say where a module comes from, if it is one of this package."""
        below = any(name.startswith(f"{fullname}.") for name in self._files)
        if fullname not in self._files:
            # A folder without __init__.py, or the package itself.
            return ModuleSpec(fullname, self, is_package=True) if below else None
        file = self._files[fullname][0]
        spec = ModuleSpec(fullname, self, origin=str(file), is_package=file.name == "__init__.py")
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the import system."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Run what was collected."""
        if module.__name__ in self._files:
            path, content = self._files[module.__name__]
            exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)


def _package(files: Mapping[str, tuple[Path, bytes]]) -> str:
    digest = hashlib.sha256()
    for module, (path, content) in sorted(files.items()):
        for part in (module.encode(), str(path.absolute()).encode(), content):
            digest.update(len(part).to_bytes(8, "big") + part)
    return PACKAGE + digest.hexdigest()[:20]


def _import(package: str, reference: Reference, files: Mapping[str, tuple[Path, bytes]]) -> ModuleType:
    finder = next((f for f in sys.meta_path if isinstance(f, _Finder) and f.package == package), None)
    if finder is None:
        finder = _Finder(package, files)
        sys.meta_path.append(finder)
    before = set(sys.modules)
    try:
        return importlib.import_module(f"{package}.{reference.module}")
    except Exception as error:
        for name in [name for name in set(sys.modules) - before if name.startswith(package)]:
            del sys.modules[name]
        sys.meta_path.remove(finder)
        where = files[reference.module][0]
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(package):
            raise MissingDependencyError(
                "The code of this model imports a package that is not installed",
                where=where,
                found=str(error),
                mend=f"Install {error.name}.",
            ) from error
        raise ConfigError(
            "The code of this model failed while it was imported",
            where=where,
            found=f"{type(error).__name__}: {error}"[:300],
            mend="Ask its authors, or correct the file.",
        ) from error


# -- writing ---------------------------------------------------------------------------------------


class AutoClassMixin:
    """Lets a class of one's own take its source file along when it is saved."""

    _auto_class: ClassVar[str | None] = None
    _auto_classes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def register_for_auto_class(cls, auto_class: str | None = None) -> None:
        """Have the source of this class saved beside the weights, and named in config.json.

        The folder then loads with ``trust_remote_code=True`` where the class is not known.

        Args:
            auto_class: The Auto class that is to find it; None for ``"AutoConfig"`` for a config and
                ``"AutoModel"`` for a model.

        Raises:
            ArgumentError: there is no such Auto class, the class is part of this library, or it is not in
                a file that can be copied (a notebook, a script that is being run).
        """
        known = cls._auto_classes
        name = auto_class or known[0]
        if name not in known:
            raise ArgumentError(
                f"{cls.__name__} cannot be registered for {name!r}",
                where="auto_class",
                expected=", ".join(known),
                mend=did_you_mean(str(name), known) or None,
            )
        if cls.__module__.startswith("pretrained."):
            raise ArgumentError(
                f"{cls.__name__} is part of this library, which needs no copy of it",
                where="register_for_auto_class",
                mend="Register a class of your own.",
            )
        _module_of(cls)
        cls._auto_class = name


def own_code(*classes: type[Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return what a save writes for classes that are registered for an Auto class.

    Args:
        *classes: The classes of a model and its config, or of a config.

    Returns:
        Entries for auto_map, and the files by name, relative to the folder; both empty where none is.

    Raises:
        ConfigError: a file imports from above its folder.
    """
    registered = {c: c.__dict__["_auto_class"] for c in classes if c.__dict__.get("_auto_class") is not None}
    if not registered:
        return {}, {}
    for cls in classes:
        # A model that brings its own file is of no use without the file of its config.
        if issubclass(cls, AutoClassMixin) and not cls.__module__.startswith("pretrained."):
            registered.setdefault(cls, cls._auto_classes[0])
    entries: dict[str, str] = {}
    files: dict[str, str] = {}
    for cls, key in registered.items():
        root, module = _module_of(cls)
        entries[key] = f"{module}.{cls.__name__}"

        def fetch(name: str, root: Path = root) -> Path | None:
            return root / name if (root / name).is_file() else None

        for path, content in collect(fetch, [module]).values():
            try:
                files[path.relative_to(root).as_posix()] = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    "A file of the model's code is not UTF-8",
                    where=path,
                    found=error.reason,
                    mend="Save it as UTF-8.",
                ) from error
    return entries, files


def write_own_code(folder: Path, files: Mapping[str, str]) -> None:
    """Write files of code into a model's folder.

    Args:
        folder: The folder.
        files: From `own_code`.
    """
    for name, text in files.items():
        file = folder / name
        if file.is_file() and file.read_bytes() == text.encode():
            continue  # saved into the folder that they were loaded from
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, text)


def _module_of(cls: type[Any]) -> tuple[Path, str]:
    """Return the folder of a class's file, and the dotted name of the file below it."""
    try:
        file = Path(inspect.getsourcefile(cls) or "")
    except (OSError, TypeError):
        file = Path()
    module = cls.__module__
    if module == "__main__" or file.suffix != ".py" or "<" in cls.__qualname__ or "." in cls.__qualname__:
        raise ArgumentError(
            f"The source of {cls.__name__} cannot be copied",
            where="register_for_auto_class",
            expected="a class at the top of a file that is imported",
            found=f"one of {module!r}",
            mend="Put it into a file of its own, and import it from there.",
        )
    if not module.startswith(PACKAGE):
        return file.parent, file.stem if file.stem != "__init__" else _no_package(cls)
    inner = module.partition(".")[2]
    return file.parents[inner.count(".")], inner


def _no_package(cls: type[Any]) -> str:
    raise ArgumentError(
        f"{cls.__name__} is in the __init__.py of a package, which cannot be copied alone",
        where="register_for_auto_class",
        mend="Put it into a file of its own, and import it from there.",
    )
