# SPDX-License-Identifier: Apache-2.0
"""Mixed state is normal: wherever weights live and however they are stored, the model is the same one.

Every architecture, scheme, tie and place is one cell. A cell is compared with the plain load of the same
checkpoint in the same scheme: logits, generated tokens, the values of offloaded parameters, and the files
that a save writes, all bit for bit.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch

from pretrained.core import registry
from pretrained.core.units import covering
from support import gguf_files
from support.cases import TINY_LLAMA
from support.cases_bert import TINY_BERT, TINY_DISTILBERT
from support.cases_gpt2 import TINY_GPT2
from support.cases_t5 import TINY_T5

# Sizes that divide into groups of 32 and blocks of GGML, and weights that span whole pages.
LLAMA = {**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 96}
T5 = {**TINY_T5, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2}
GATED_T5 = {**T5, "feed_forward_proj": "gated-gelu"}
BERT = {**TINY_BERT, "hidden_size": 64, "intermediate_size": 96}
CONFIGS = {
    "bert": BERT,
    "camembert": BERT,
    "distilbert": {**TINY_DISTILBERT, "dim": 64, "hidden_dim": 96},
    "gpt2": {**TINY_GPT2, "n_embd": 64},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": None},
    "mt5": GATED_T5,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 16},
    "roberta": BERT,
    "smollm3": {**LLAMA, "num_hidden_layers": 4},
    "t5": T5,
    "umt5": GATED_T5,
    "xlm-roberta": BERT,
}
# The first of these tasks that a family has names the class that is tested.
TASKS = ("ForSeq2SeqLM", "ForMaskedLM", "ForCausalLM")

PLAIN = ("float32", "bfloat16", "float16")
QUANTIZED = {
    # With its head, so that a tied weight and its scales are placed as one.
    "int8": {"quant_method": "int8", "quantize_head": True},
    "int4": {"quant_method": "int4"},
}
SCHEMES = (*PLAIN, *QUANTIZED, "gguf")
# These keep some weights in float32 where the rest is float16, also where the file has them in float16.
KEPT = ("mt5", "t5", "umt5")
PLACES = ("resident", "cpu", "disk", "mixed")

NO_GGUF = {
    "bert": "GGUF has no architecture of this kind that is read here",
    "camembert": "GGUF has no architecture of this kind that is read here",
    "distilbert": "GGUF has no architecture of this kind that is read here",
    "mt5": "a GGUF file of an mT5 says that it is a T5",
    "roberta": "GGUF has no architecture of this kind that is read here",
    "xlm-roberta": "GGUF has no architecture of this kind that is read here",
}


@dataclass(frozen=True)
class Model:
    """A checkpoint and the scheme that it is loaded in."""

    family: str
    scheme: str
    tied: bool

    def __str__(self):
        return f"{self.family}-{self.scheme}-{'tied' if self.tied else 'untied'}"

    @property
    def model_class(self):
        tasks = registry.FAMILIES[self.family].models["torch"].tasks
        task = next(task for task in TASKS if task in tasks)
        return registry.load_name(*registry.model_class_name(self.family, task))


def models():
    for family, scheme, tied in product(CONFIGS, SCHEMES, (True, False)):
        if scheme != "gguf" or family not in NO_GGUF:
            yield Model(family, scheme, tied)


def test_the_matrix_has_every_architecture():
    assert set(CONFIGS) == set(registry.FAMILIES)
    assert set(NO_GGUF) == set(CONFIGS) - set(gguf_files.ARCHITECTURES)


IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


class Expected:
    """What the plain load of a checkpoint says, and where the checkpoint is."""

    def __init__(self, model, root: Path):
        self.model, self.root = model, root
        torch.manual_seed(7)
        cls = model.model_class
        config = cls.config_class(**{**CONFIGS[model.family], "tie_word_embeddings": model.tied})
        built = cls(config).eval()
        with torch.no_grad():
            for parameter in built.parameters():
                # Norms of one and biases of zero would hide a weight that went to another's place.
                parameter.add_(torch.randn_like(parameter) * 0.05)
        self.source = root / "source"
        if model.scheme == "gguf":
            root.mkdir()
            self.source = gguf_files.write_gguf(built, root / "source.gguf")
        else:
            plain = getattr(torch, model.scheme) if model.scheme in PLAIN else torch.float32
            built.to(plain).save_pretrained(self.source)
        self.resident = self.load()
        assert self.resident.config.tie_word_embeddings is model.tied
        self.logits, self.tokens = outputs_of(self.resident), tokens_of(self.resident)
        self.state = self.resident.state_dict()
        self.resident.save_pretrained(root / "resident")
        self.files = contents(root / "resident")

    def load(self, **arguments):
        """Load the checkpoint in the cell's scheme."""
        scheme = self.model.scheme
        if scheme in QUANTIZED:
            arguments["quantization_config"] = QUANTIZED[scheme]
        elif scheme == "gguf":
            arguments["quantization_config"] = {"quant_method": "gguf"}
        return self.model.model_class.from_pretrained(self.source, dtype="auto", **arguments)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def outputs_of(model):
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS.flip(1)
    with torch.no_grad():
        return model(**inputs).logits


def tokens_of(model):
    if not model.can_generate():
        return None
    return model.generate(IDS, max_new_tokens=3, do_sample=False)


def map_of(model, place):
    """Return the device map of a place, for a loaded model of the same kind."""
    if place in ("cpu", "disk"):
        return {"": place}
    whole = model._no_split_modules
    blocks = [path for path, module in model.named_modules() if type(module).__name__ in whole]
    assert len(blocks) > 1
    return {"": "cpu", **dict.fromkeys(blocks[::2], "disk")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A function from a model to what its plain load says; the last one is kept."""
    last = []

    def of(model):
        if not last or last[0].model != model:
            last[:] = [Expected(model, tmp_path_factory.mktemp("mixed") / str(model))]
        return last[0]

    with pytest.MonkeyPatch.context() as patch:
        # What a save brings to the disk is tested elsewhere; it takes most of the time here.
        patch.setattr("os.fsync", lambda descriptor: None)
        yield of


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model", [*models()], ids=str)
def test_a_model_is_the_same_wherever_it_lives(expected, model, place, tmp_path):
    said = expected(model)
    if place == "resident":
        again = said.load()
        assert not hasattr(again, "hf_device_map")
        device_map = None
    else:
        device_map = map_of(said.resident, place)
        # Only weights that this load rounds or casts are copied; without a folder nothing can be.
        is_copied = model.scheme in QUANTIZED or (model.scheme == "float16" and model.family in KEPT)
        again = said.load(device_map=device_map, offload_folder=tmp_path / "copies" if is_copied else None)
        assert again.hf_device_map == device_map
    assert torch.equal(outputs_of(again), said.logits)
    if said.tokens is not None:
        assert torch.equal(tokens_of(again), said.tokens)
    check_values(again, said, device_map or {})
    again.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == said.files
    assert torch.equal(outputs_of(again), said.logits)


def check_values(model, said, device_map):
    """Check that weights read right, and that those on disk are there: views of a file's pages."""
    assert model.state_dict().keys() == said.state.keys()
    assert all(torch.equal(value, said.state[key]) for key, value in model.state_dict().items())
    for alias, owner in model.ties().items():
        assert model.get_parameter(alias) is model.get_parameter(owner)
    away = 0
    for key, parameter in model.named_parameters():
        path = covering(key, device_map)
        if path is None or device_map[path] != "disk":
            continue
        away += 1
        assert model._dispatch.store.span_of(parameter.data) is not None, key
        same = said.resident.get_parameter(key) if said.model.scheme == "gguf" else said.state[key]
        assert torch.equal(parameter, same), key
    assert away or "disk" not in device_map.values()
