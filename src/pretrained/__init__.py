# SPDX-License-Identifier: Apache-2.0
"""Load, run, edit, save and share pretrained models of any size, from one set of files.

Importing this package loads nothing: its names are a table (PEP 562), and a name's module is imported
when the name is first asked for. The classes of each architecture come from `core.registry`; type
checkers and editors read the same names from ``__init__.pyi``, which ``tools/write_stub.py`` writes.
"""

__version__ = "0.1.0"

# Module -> its public names, apart from the configs and models of the registry.
_NAMES = {
    "pretrained.errors": (
        "ArgumentError",
        "CheckpointError",
        "ConfigError",
        "FileError",
        "GenerationError",
        "MissingDependencyError",
        "NotYetError",
        "PlacementError",
        "PretrainedError",
        "TokenizerError",
        "UnknownArgumentError",
        "WeightsError",
    ),
    "pretrained.core.compiling": ("CompileConfig",),
    "pretrained.core.config": ("PreTrainedConfig", "PretrainedConfig"),
    "pretrained.core.constraints": (
        "Constraint",
        "ConstraintListState",
        "DisjunctiveConstraint",
        "PhrasalConstraint",
    ),
    "pretrained.core.generation_config": ("GenerationConfig", "GenerationMode"),
    "pretrained.core.watermarking": ("SynthIDTextWatermarkingConfig", "WatermarkingConfig"),
    "pretrained.core.push": ("PushToHubMixin",),
    "pretrained.core.quantization": ("QuantizationConfig",),
    "pretrained.auto": (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForMultipleChoice",
        "AutoModelForNextSentencePrediction",
        "AutoModelForPreTraining",
        "AutoModelForQuestionAnswering",
        "AutoModelForSeq2SeqLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTextEncoding",
        "AutoModelForTokenClassification",
        "AutoModelWithLMHead",
    ),
    "pretrained.text.encoding": ("BatchEncoding",),
    "pretrained.text.tokenizer": ("AutoTokenizer", "PreTrainedTokenizer"),
    "pretrained.torch.model": ("PreTrainedModel",),
    "pretrained.torch.utils_mixin": ("ModuleUtilsMixin",),
    "pretrained.torch.embeddings_mixin": ("EmbeddingAccessMixin",),
    "pretrained.torch.big_modeling": (
        "cpu_offload",
        "disk_offload",
        "dispatch_model",
        "init_empty_weights",
        "load_checkpoint_and_dispatch",
        "load_checkpoint_in_model",
    ),
    "pretrained.torch.device_maps": (
        "compute_module_sizes",
        "get_balanced_memory",
        "get_max_memory",
        "infer_auto_device_map",
    ),
    "pretrained.torch.nn": ("Conv1D",),
    "pretrained.torch.attention": ("AttentionInterface",),
    "pretrained.torch.cache": (
        "Cache",
        "CacheLayer",
        "DynamicCache",
        "DynamicLayer",
        "DynamicSlidingLayer",
        "EncoderDecoderCache",
        "OffloadedLayer",
        "QuantizedCache",
        "QuantizedLayer",
        "SlidingWindowCache",
        "StaticCache",
        "StaticLayer",
        "StaticSlidingWindowLayer",
    ),
    "pretrained.torch.outputs": (
        "BaseModelOutput",
        "BaseModelOutputWithPast",
        "BaseModelOutputWithPastAndCrossAttentions",
        "BaseModelOutputWithPooling",
        "BaseModelOutputWithPoolingAndCrossAttentions",
        "CausalLMOutput",
        "CausalLMOutputWithCrossAttentions",
        "CausalLMOutputWithPast",
        "MaskedLMOutput",
        "ModelOutput",
        "MultipleChoiceModelOutput",
        "NextSentencePredictorOutput",
        "QuestionAnsweringModelOutput",
        "Seq2SeqLMOutput",
        "Seq2SeqModelOutput",
        "Seq2SeqQuestionAnsweringModelOutput",
        "Seq2SeqSequenceClassifierOutput",
        "SequenceClassifierOutput",
        "SequenceClassifierOutputWithPast",
        "TokenClassifierOutput",
    ),
    "pretrained.core.batching_config": ("ContinuousBatchingConfig",),
    "pretrained.torch.generation.batch_manager": ("ContinuousBatchingManager",),
    "pretrained.torch.generation.batch_requests": ("GenerationOutput", "RequestStatus"),
    "pretrained.torch.cache_paged": ("PagedCache",),
    "pretrained.torch.generation.mixin": ("GenerationMixin",),
    "pretrained.torch.generation.outputs": (
        "BeamSampleDecoderOnlyOutput",
        "BeamSampleEncoderDecoderOutput",
        "BeamSearchDecoderOnlyOutput",
        "BeamSearchEncoderDecoderOutput",
        "ContrastiveSearchDecoderOnlyOutput",
        "ContrastiveSearchEncoderDecoderOutput",
        "GenerateBeamDecoderOnlyOutput",
        "GenerateBeamEncoderDecoderOutput",
        "GenerateDecoderOnlyOutput",
        "GenerateEncoderDecoderOutput",
        "GreedySearchDecoderOnlyOutput",
        "GreedySearchEncoderDecoderOutput",
        "SampleDecoderOnlyOutput",
        "SampleEncoderDecoderOutput",
    ),
    "pretrained.torch.generation.guidance": ("UnbatchedClassifierFreeGuidanceLogitsProcessor",),
    "pretrained.torch.generation.logits": (
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "HammingDiversityLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "LogitsProcessor",
        "LogitsProcessorList",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    ),
    "pretrained.torch.generation.warpers": (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "MinPLogitsWarper",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    ),
    "pretrained.torch.generation.model_rules": (
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "ForceTokensLogitsProcessor",
        "WhisperTimeStampLogitsProcessor",
    ),
    "pretrained.torch.generation.watermark": (
        "SynthIDTextWatermarkLogitsProcessor",
        "WatermarkLogitsProcessor",
    ),
    "pretrained.torch.generation.watermark_detection": (
        "SynthIDTextWatermarkDetector",
        "WatermarkDetector",
        "WatermarkDetectorOutput",
    ),
    "pretrained.torch.generation.stopping": (
        "ConfidenceCriteria",
        "EosTokenCriteria",
        "InterruptCriteria",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "StopStringCriteria",
        "StoppingCriteria",
        "StoppingCriteriaList",
    ),
    "pretrained.torch.generation.prefixes": ("PrefixCache",),
    "pretrained.torch.generation.turns": ("TurnCache",),
    "pretrained.torch.generation.streamers": (
        "AsyncTextIteratorStreamer",
        "BaseStreamer",
        "TextIteratorStreamer",
        "TextStreamer",
    ),
}


def _modules() -> dict[str, str]:
    """Return where each public name is defined."""
    # Imported here: the root stays free of even the standard library's heavier parts.
    from pretrained.core.registry import FAMILIES  # noqa: PLC0415

    table = {name: module for module, names in _NAMES.items() for name in names}
    for row in FAMILIES.values():
        table[row.config] = row.arch
        for models in row.models.values():
            table.update(dict.fromkeys(models.classes, models.module))
    return dict(sorted(table.items()))


def __getattr__(name: str) -> object:
    if name == "__all__":
        return ["__version__", *_modules()]
    module = None if name.startswith("_") else _modules().get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pretrained.core.registry import load_name  # noqa: PLC0415 - as in _modules

    value = load_name(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_modules()})
