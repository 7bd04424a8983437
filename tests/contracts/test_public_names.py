# SPDX-License-Identifier: Apache-2.0
"""Every public name of the package, in groups, each with why it is public. A change here is a decision."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest

import pretrained

PROJECT = Path(__file__).parents[2]
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def decoder(family: str) -> list[str]:
    return [family + suffix for suffix in ("Config", "PreTrainedModel", "Model", "ForCausalLM", *HEADS)]


def encoder_decoder(family: str) -> list[str]:
    stacks = ("Config", "PreTrainedModel", "Model", "EncoderModel", "ForConditionalGeneration")
    return [family + suffix for suffix in (*stacks, *HEADS)]


def encoder(family: str, *more: str) -> list[str]:
    shared = ("Config", "PreTrainedModel", "Model", "ForMaskedLM", "ForMultipleChoice", *HEADS)
    return [family + suffix for suffix in (*shared, *more)]


def words(text: str) -> list[str]:
    return text.split()


OLD_OUTPUTS = [
    f"{strategy}{kind}Output"
    for strategy in ("GreedySearch", "Sample", "ContrastiveSearch", "BeamSearch", "BeamSample")
    for kind in ("DecoderOnly", "EncoderDecoder")
]

GROUPS = {
    "scripts print it in bug reports": ["__version__"],
    "users catch failures by kind; each also is the built-in error of that kind": words("""
        PretrainedError ArgumentError CheckpointError ConfigError FileError GenerationError
        MissingDependencyError NotYetError PlacementError TokenizerError UnknownArgumentError WeightsError
        """),
    "the base of all configs, under the newer name and the older": ["PreTrainedConfig", "PretrainedConfig"],
    "scripts that work with any architecture": words("""
        AutoConfig AutoTokenizer AutoModel AutoModelForPreTraining AutoModelForCausalLM AutoModelForMaskedLM
        AutoModelForSeq2SeqLM AutoModelForSequenceClassification AutoModelForTokenClassification
        AutoModelForQuestionAnswering AutoModelForMultipleChoice AutoModelForNextSentencePrediction
        AutoModelForTextEncoding
        """),
    "old scripts; deprecated": ["AutoModelWithLMHead"],
    "bases and mixins that the ecosystem documents, to subclass and to test with isinstance": words("""
        PreTrainedModel ModuleUtilsMixin EmbeddingAccessMixin GenerationMixin PushToHubMixin
        """),
    "many requests at once: settings, the manager, what it hands out, and its cache": words("""
        ContinuousBatchingConfig ContinuousBatchingManager GenerationOutput RequestStatus PagedCache
        """),
    "attention implementations of one's own": ["AttentionInterface"],
    "adapters look for GPT-2's layer by its class": ["Conv1D"],
    "Llama family": [
        name for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3") for name in decoder(family)
    ],
    "GPT-2": words("""
        GPT2Config GPT2PreTrainedModel GPT2Model GPT2LMHeadModel GPT2DoubleHeadsModel
        GPT2ForSequenceClassification GPT2ForTokenClassification GPT2ForQuestionAnswering
        """),
    "T5 family": [name for family in ("T5", "MT5", "UMT5") for name in encoder_decoder(family)],
    "BERT": encoder("Bert", "ForPreTraining", "LMHeadModel", "ForNextSentencePrediction"),
    "RoBERTa, also under the names of checkpoints with other vocabularies": [
        name for family in ("Roberta", "XLMRoberta", "Camembert") for name in encoder(family, "ForCausalLM")
    ],
    "DistilBERT": encoder("DistilBert"),
    "callers make caches, keep them between calls, and build them from layers": words("""
        Cache DynamicCache StaticCache SlidingWindowCache QuantizedCache EncoderDecoderCache
        CacheLayer DynamicLayer DynamicSlidingLayer StaticLayer StaticSlidingWindowLayer QuantizedLayer
        OffloadedLayer TurnCache PrefixCache
        """),
    "type annotations and isinstance on what forwards return": words("""
        ModelOutput BaseModelOutput BaseModelOutputWithPast BaseModelOutputWithPastAndCrossAttentions
        BaseModelOutputWithPooling BaseModelOutputWithPoolingAndCrossAttentions CausalLMOutput
        CausalLMOutputWithCrossAttentions CausalLMOutputWithPast MaskedLMOutput MultipleChoiceModelOutput
        NextSentencePredictorOutput QuestionAnsweringModelOutput Seq2SeqLMOutput Seq2SeqModelOutput
        Seq2SeqQuestionAnsweringModelOutput Seq2SeqSequenceClassifierOutput SequenceClassifierOutput
        SequenceClassifierOutputWithPast TokenClassifierOutput
        """),
    "settings of generate": ["GenerationConfig", "GenerationMode", "CompileConfig"],
    "placing any module, under the names of accelerate": words("""
        init_empty_weights infer_auto_device_map compute_module_sizes get_max_memory get_balanced_memory
        load_checkpoint_in_model load_checkpoint_and_dispatch dispatch_model cpu_offload disk_offload
        """),
    "settings of quantized loads": ["QuantizationConfig"],
    "type annotations and isinstance on what generate returns": words("""
        GenerateDecoderOnlyOutput GenerateEncoderDecoderOutput GenerateBeamDecoderOnlyOutput
        GenerateBeamEncoderDecoderOutput
        """),
    "the same under the names of older scripts, one for each strategy": OLD_OUTPUTS,
    "what a text must contain, for beam search": words("""
        Constraint PhrasalConstraint DisjunctiveConstraint ConstraintListState
        """),
    "watermarks: settings, rules and detectors": words("""
        WatermarkingConfig WatermarkLogitsProcessor WatermarkDetector WatermarkDetectorOutput
        SynthIDTextWatermarkingConfig SynthIDTextWatermarkLogitsProcessor SynthIDTextWatermarkDetector
        """),
    "rules of speech and audio models, and forced tokens, to pass to generate": words("""
        AlternatingCodebooksLogitsProcessor BarkEosPrioritizerLogitsProcessor
        ClassifierFreeGuidanceLogitsProcessor ForceTokensLogitsProcessor WhisperTimeStampLogitsProcessor
        """),
    "rules on scores, to pass to generate and to subclass": words("""
        LogitsProcessor LogitsProcessorList
        EncoderNoRepeatNGramLogitsProcessor EncoderRepetitionPenaltyLogitsProcessor
        ExponentialDecayLengthPenalty ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor
        HammingDiversityLogitsProcessor
        InfNanRemoveLogitsProcessor LogitNormalization MinLengthLogitsProcessor
        MinNewTokensLengthLogitsProcessor NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor
        PrefixConstrainedLogitsProcessor RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor
        SuppressTokensAtBeginLogitsProcessor SuppressTokensLogitsProcessor
        EpsilonLogitsWarper EtaLogitsWarper MinPLogitsWarper TemperatureLogitsWarper TopHLogitsWarper
        TopKLogitsWarper TopPLogitsWarper TypicalLogitsWarper
        UnbatchedClassifierFreeGuidanceLogitsProcessor
        """),
    "when to stop, to pass to generate and to subclass": words("""
        StoppingCriteria StoppingCriteriaList EosTokenCriteria MaxLengthCriteria MaxTimeCriteria
        StopStringCriteria InterruptCriteria ConfidenceCriteria
        """),
    "text as it is generated": words("""
        BaseStreamer TextStreamer TextIteratorStreamer AsyncTextIteratorStreamer
        """),
    "type annotations and isinstance on tokenizers and what they return": words("""
        PreTrainedTokenizer BatchEncoding
        """),
}


def test_public_names_are_those_agreed():
    agreed = [name for names in GROUPS.values() for name in names]
    assert len(agreed) == len(set(agreed)), "a name in two groups"
    assert sorted(pretrained.__all__) == sorted(agreed)


@pytest.mark.parametrize("name", [name for name in pretrained.__all__ if not name.startswith("_")])
def test_each_name_is_where_the_table_says(name):
    value = getattr(pretrained, name)
    assert value.__name__ == name or name in ("PretrainedConfig", *OLD_OUTPUTS)
    # A large module may have its classes defined in a neighbour.
    room = pretrained._modules()[name].rpartition(".")[0]
    assert value.__module__.startswith(room)
    assert (value.__doc__ or "").strip()


def test_dir_lists_every_name():
    assert set(pretrained.__all__) <= set(dir(pretrained))


def test_stub_for_type_checkers_lists_the_same_names():
    spec = importlib.util.spec_from_file_location("write_stub", PROJECT / "tools" / "write_stub.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    stub = Path(pretrained.__file__).with_suffix(".pyi")
    assert stub.read_text(encoding="utf-8") == tool.stub(), "run python tools/write_stub.py"


def test_version_is_the_packages():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pretrained.__version__ == project["version"]
