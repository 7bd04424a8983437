# SPDX-License-Identifier: Apache-2.0
"""``pretrained doctor [MODEL]``: what is wrong with this machine or a model's files, and what helps."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from pretrained import __version__
from pretrained.arch.gguf import gguf_architecture, gguf_config, gguf_key_map
from pretrained.arch.skeletons import architecture_of, config_of, policy_for, skeleton_for
from pretrained.core import doctor as core
from pretrained.core.budgets import available_host_memory
from pretrained.core.checkpoint import Checkpoint
from pretrained.core.config import CONFIG_NAME, PreTrainedConfig, read_json_object
from pretrained.core.convert import work_path
from pretrained.core.disk_space import free_bytes
from pretrained.core.doctor import Environment, Finding
from pretrained.core.files import find_weights, open_checkpoint
from pretrained.core.generation_config import GENERATION_CONFIG_NAME, GenerationConfig
from pretrained.core.hub import HubOptions, Source, resolve
from pretrained.core.plan import plan_load
from pretrained.core.quantized_files import split_quantized
from pretrained.core.registry import FAMILIES, model_type_of
from pretrained.core.report import format_bytes
from pretrained.errors import PretrainedError

_PACKAGES: Final = (
    "torch", "safetensors", "huggingface_hub", "tokenizers", "jinja2", "numpy", "ml_dtypes", "tqdm",
)  # fmt: skip
# What pyproject.toml asks for, where the installed package's own record cannot be read.
_LEAST: Final = {
    "huggingface_hub": "0.34",
    "ml_dtypes": "0.5",
    "numpy": "1.26",
    "tqdm": "4.66",
    "torch": "2.6",
    "tokenizers": "0.21",
    "jinja2": "3.1.6",
}
_NEEDED: Final = frozenset({"huggingface_hub", "ml_dtypes", "numpy", "tqdm"})
_SETTINGS: Final = (
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE",
    "HTTP_PROXY", "HTTPS_PROXY", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
)  # fmt: skip
_TOKENIZER_FILES: Final = (
    "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
_BYTE_MODELS: Final = ("ByT5Tokenizer", "ByT5TokenizerFast")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments.

    Args:
        parser: The verb's own.
    """
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="folder, weights file or hub id (default: this machine only)",
    )
    parser.add_argument(
        "--values", action="store_true", help="read every weight, and look for NaN and infinities"
    )
    parser.add_argument("--variant", help="infix of the weights' file names, such as fp16")
    parser.add_argument("--gguf-file", metavar="NAME", help="which GGUF file of a folder or repository")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--offline", action="store_true", help="use local files and the download cache only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(execute=doctor)


def doctor(options: argparse.Namespace) -> int:
    """Print what is wrong, and what can be done about it.

    Args:
        options: The parsed arguments.

    Returns:
        1 where there is a fault, 0 otherwise; notices are no faults.
    """
    machine = environment()
    findings = core.check_environment(machine)
    model = None if options.model is None else _Model(options)
    if model is not None:
        model.check()
        findings += model.findings
    faults = sum(finding.level == "fault" for finding in findings)
    if options.json:
        facts = {
            "ok": not faults,
            "environment": asdict(replace(machine, needed=frozenset())) | {"needed": sorted(machine.needed)},
            "model": None if model is None else {"name": options.model, **model.facts},
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(facts, indent=2))
        return 1 if faults else 0
    _print_machine(machine)
    if model is not None:
        print(f"\n{options.model}: {', '.join(str(fact) for fact in model.facts.values())}")
        print(f"  looked at: {', '.join(model.looked_at)}")
    print()
    for finding in sorted(findings, key=lambda finding: finding.level):
        print(finding)
    notices = len(findings) - faults
    print("nothing to do" if not findings else f"faults: {faults}, notices: {notices}")
    return 1 if faults else 0


# The machine


def environment() -> Environment:
    """Look at this machine, without importing what is looked at."""
    cache = _cache_folder()
    return Environment(
        python=platform.python_version(),
        versions={name: _version(name) for name in _PACKAGES},
        least=_least(),
        needed=_NEEDED,
        accelerators=_accelerators(),
        memory_free=available_host_memory(),
        cache=str(cache),
        disk_free=free_bytes(next(p for p in (cache, *cache.parents) if p.is_dir())),
        partial=_partial(cache),
        settings={name: _without_password(os.environ[name]) for name in _SETTINGS if name in os.environ},
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _without_password(value: str) -> str:
    """Leave out of a proxy's address what nobody should paste into a report."""
    return re.sub(r"//[^/@]*@", "//...@", value)


def _least() -> dict[str, str]:
    """Return the least versions that the installed package asks for, extras included."""
    try:
        required = metadata.requires("pretrained") or []
    except metadata.PackageNotFoundError:
        required = []
    found = (re.match(r"([\w-]+)>=([\d.]+)", line) for line in required)
    asked = {match[1].replace("-", "_").lower(): match[2] for match in found if match}
    return _LEAST | {name: version for name, version in asked.items() if name in _LEAST}


def _cache_folder() -> Path:
    """Return the download cache, by the rules of huggingface_hub."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(base) / "huggingface"
    return (Path(home) / "hub").expanduser().absolute()


def _partial(cache: Path) -> dict[str, int]:
    found = {}
    for file in cache.glob("models--*/blobs/*.incomplete"):
        try:
            found[str(file)] = file.stat().st_size
        except OSError:
            continue
    return found


def _accelerators() -> tuple[str, ...]:
    """Return the devices that the system itself shows; no framework is asked."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.MULTILINE)
        names.append(model[1] if model else "NVIDIA")
    if Path("/dev/kfd").exists():
        names.append("AMD")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        names.append("Apple")
    return tuple(names)


def _print_machine(machine: Environment) -> None:
    print(f"pretrained {__version__}, Python {machine.python}, {platform.system()} {platform.machine()}")
    print(
        "  packages: " + ", ".join(f"{name} {version or '-'}" for name, version in machine.versions.items())
    )
    free = "unknown" if machine.memory_free is None else format_bytes(machine.memory_free)
    disk = "unknown" if machine.disk_free is None else format_bytes(machine.disk_free)
    print(f"  memory:   {free} free; accelerators: {', '.join(machine.accelerators) or 'none'}")
    print(f"  cache:    {machine.cache}, {disk} free on its disk")
    settings = ", ".join(f"{name}={value}" for name, value in machine.settings.items())
    print(f"  settings: {settings or 'none in the environment'}")


# A model


@dataclass
class _Model:
    """A model that is looked at; what is found is collected, so that one fault does not hide another.

    Attributes:
        options: The parsed arguments.
        findings: What was found so far.
        facts: What the model is.
        looked_at: What was checked.
    """

    options: argparse.Namespace
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    looked_at: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Look at everything."""
        hub = HubOptions(revision=self.options.revision or "main", local_files_only=self.options.offline)
        source = resolve(self.options.model, hub)
        if source.kind == "folder":
            self.looked_at.append("files")
            sizes = {
                entry.name: entry.stat().st_size for entry in os.scandir(source.folder) if entry.is_file()
            }
            self.findings += core.check_listing(source.folder, sizes)
            unfinished = work_path(source.folder.absolute())
            if unfinished.exists():
                what = "A conversion to this folder was cut off, or is still running"
                mend = "Run it again to go on, or remove that folder."
                self.findings.append(Finding("notice", what, str(unfinished), mend))
        checkpoint = self._checkpoint(source)
        values = self._values(source, checkpoint)
        config = self._config(values)
        if checkpoint is not None:
            count = sum(info.num_elements for info in checkpoint.tensors.values())
            self.facts |= {"format": checkpoint.format, "tensors": f"{len(checkpoint.tensors)} tensors"}
            self.facts |= {"parameters": f"{count:,} parameters", "size": format_bytes(checkpoint.nbytes)}
        if values:
            self.looked_at.append("config")
            plain = None if checkpoint is not None and checkpoint.format == "gguf" else checkpoint
            self.findings += core.check_config(values, plain)
        if config is not None and checkpoint is not None:
            self._weights(config, values, checkpoint)
        vocab_size = values.get("vocab_size") if isinstance(values.get("vocab_size"), int) else None
        self._beside(source, values, checkpoint, vocab_size)
        if self.options.values and checkpoint is not None:
            self.looked_at.append("every value")
            self.findings += core.check_values(checkpoint)

    def _checkpoint(self, source: Source) -> Checkpoint | None:
        self.looked_at.append("headers")
        options = self.options
        try:
            if source.kind == "file" and source.path is not None and source.path.suffix != ".json":
                return open_checkpoint(source.path)
            folder = source.weights_folder(variant=options.variant, gguf_file=options.gguf_file)
            weights = find_weights(folder, variant=options.variant, gguf_file=options.gguf_file)
        except PretrainedError as error:
            self.findings.append(core.of_error(error))
            return None
        each = core.check_weights(weights.files)
        self.findings += each
        if each:
            return None
        try:
            return open_checkpoint(weights)
        except PretrainedError as error:
            self.findings.append(core.of_error(error))
            return None

    def _values(self, source: Source, checkpoint: Checkpoint | None) -> dict[str, Any]:
        try:
            if checkpoint is not None and checkpoint.format == "gguf":
                return gguf_config(checkpoint.metadata, checkpoint.tensors)
            return read_json_object(source.require(CONFIG_NAME))
        except PretrainedError as error:
            self.findings.append(core.of_error(error))
            return {}

    def _config(self, values: dict[str, Any]) -> PreTrainedConfig | None:
        if not values:
            return None
        model_type = model_type_of(values)
        if model_type is not None and not (isinstance(model_type, str) and model_type in FAMILIES):
            what = f"The architecture {model_type!r} is not known here, nor what weights it needs"
            self.findings.append(Finding("fault", what, CONFIG_NAME, f"Known are {', '.join(FAMILIES)}."))
            return None
        try:
            config = config_of(values | {"model_type": model_type}, where=CONFIG_NAME)
            self.facts["architecture"] = architecture_of(config)
        except PretrainedError as error:
            self.findings.append(core.of_error(error))
            return None
        return config

    def _weights(self, config: PreTrainedConfig, values: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        self.looked_at.append("weights against the architecture")
        try:
            skeleton = skeleton_for(config)
            policy = replace(policy_for(config, None), allow_missing=True, ignore_mismatched_sizes=True)
            special: dict[str, int] = {}
            layouts, plain = None, checkpoint
            if checkpoint.format == "gguf":
                arch = gguf_architecture(checkpoint.metadata)
                layouts = gguf_key_map(arch, values, checkpoint.tensors)
            elif values.get("quantization_config"):
                plain, special = split_quantized(checkpoint, skeleton, policy)
            found = plan_load(plain, skeleton, policy, layouts=layouts)
        except PretrainedError as error:
            self.findings.append(core.of_error(error))
            return
        self.findings += core.check_plan(found, skeleton, special)
        self.findings += core.check_ties(checkpoint, skeleton.ties)

    def _beside(
        self,
        source: Source,
        values: Mapping[str, Any],
        checkpoint: Checkpoint | None,
        vocab_size: int | None,
    ) -> None:
        """Look at the generation config and the tokenizer."""
        file = source.file(GENERATION_CONFIG_NAME, required=False)
        if file is not None:
            self.looked_at.append("generation config")
            try:
                config = GenerationConfig.from_json_file(file)
                self.findings += core.check_generation(config, vocab_size)
            except PretrainedError as error:
                self.findings.append(core.of_error(error))
        if checkpoint is not None and checkpoint.format == "gguf":
            if "tokenizer.ggml.tokens" not in checkpoint.metadata:
                self.findings.append(Finding("notice", "The GGUF file has no tokenizer"))
            return
        settings = source.file("tokenizer_config.json", required=False)
        self.looked_at.append("tokenizer")
        if settings is not None:
            try:
                if read_json_object(settings).get("tokenizer_class") in _BYTE_MODELS:
                    return  # bytes need no vocabulary
            except PretrainedError as error:
                self.findings.append(core.of_error(error))
        found = {name: source.file(name, required=False) for name in _TOKENIZER_FILES}
        files = {name: path for name, path in found.items() if path is not None}
        self.findings += core.check_tokenizer(files, vocab_size)
