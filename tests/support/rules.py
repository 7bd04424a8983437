# SPDX-License-Identifier: Apache-2.0
"""Every rule on scores with arguments, beside its slow numpy version with its arguments."""

import math

import torch

from pretrained.testing import reference

VOCAB, ROWS, LENGTH = 23, 4, 9
INF = math.inf


def make(seed=0, rows=ROWS, length=LENGTH):
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 7, (rows, length), generator=gen)
    scores = torch.randn(rows, VOCAB, generator=gen) * 3
    scores[0, 5] = -INF
    return ids, scores


SOURCE = torch.randint(0, 7, (2, 12), generator=torch.Generator().manual_seed(5))
BIAS = {(3,): -1.5, (2,): 4.0, (1, 4): 2.0, (6, 0): -INF, (1, 2, 3, 4): 9.0}

# Class in both libraries, its arguments, the slow version, its arguments.
CASES = [
    ("MinLengthLogitsProcessor", (10, [2, 4]), reference.min_length, (10, [2, 4])),
    ("MinLengthLogitsProcessor", (9, 2), reference.min_length, (9, [2])),
    ("MinNewTokensLengthLogitsProcessor", (7, 3, 2), reference.min_length, (10, [2])),
    ("RepetitionPenaltyLogitsProcessor", (1.7,), reference.repetition, (1.7,)),
    ("RepetitionPenaltyLogitsProcessor", (0.6, 4), reference.repetition, (0.6, 4)),
    (
        "RepetitionPenaltyLogitsProcessor",
        (1.7, torch.tensor([0, 3, 5, 8])),
        reference.repetition,
        (1.7, [0, 3, 5, 8]),
    ),
    ("EncoderRepetitionPenaltyLogitsProcessor", (1.4, SOURCE), lambda i, s: encoder_repetition(s, 1.4), ()),
    ("NoRepeatNGramLogitsProcessor", (1,), reference.no_repeated_ngram, (1,)),
    ("NoRepeatNGramLogitsProcessor", (2,), reference.no_repeated_ngram, (2,)),
    ("NoRepeatNGramLogitsProcessor", (3,), reference.no_repeated_ngram, (3,)),
    ("NoRepeatNGramLogitsProcessor", (30,), reference.no_repeated_ngram, (30,)),
    (
        "EncoderNoRepeatNGramLogitsProcessor",
        (2, SOURCE),
        reference.no_repeated_ngram,
        (2, SOURCE.numpy()),
    ),
    ("SequenceBiasLogitsProcessor", (BIAS,), reference.biased_sequences, (BIAS,)),
    (
        "NoBadWordsLogitsProcessor",
        ([[3], [1, 4], [6, 0], [2]], 2),
        reference.biased_sequences,
        ({(3,): -INF, (1, 4): -INF, (6, 0): -INF},),
    ),
    ("ForcedEOSTokenLogitsProcessor", (10, [2, 3]), reference.forced_last, (10, [2, 3])),
    ("ForcedEOSTokenLogitsProcessor", (12, 2), reference.forced_last, (12, [2])),
    ("ForcedBOSTokenLogitsProcessor", (2,), reference.forced_first, (2,)),
    (
        "ExponentialDecayLengthPenalty",
        ((2, 1.3), [2, 5], 4),
        reference.decaying_length,
        (2, 1.3, [2, 5], 4),
    ),
    ("ExponentialDecayLengthPenalty", ((9, 1.3), 2, 4), reference.decaying_length, (9, 1.3, [2], 4)),
    ("LogitNormalization", (), reference.log_normalised, ()),
    ("SuppressTokensLogitsProcessor", ([1, 4],), lambda i, s: reference.without(s, [1, 4]), ()),
    ("SuppressTokensAtBeginLogitsProcessor", ([1, 4], 9), reference.suppressed_at_begin, ([1, 4], 9)),
    ("SuppressTokensAtBeginLogitsProcessor", ([1, 4], 8), reference.suppressed_at_begin, ([1, 4], 8)),
    ("TemperatureLogitsWarper", (0.7,), lambda i, s: s / 0.7, ()),
    ("TopKLogitsWarper", (5,), reference.top_k, (5,)),
    ("TopKLogitsWarper", (99,), reference.top_k, (VOCAB,)),
    ("TopPLogitsWarper", (0.8,), reference.top_p, (0.8,)),
    ("TopPLogitsWarper", (0.01, -INF, 3), reference.top_p, (0.01, 3)),
    ("TopHLogitsWarper", (0.4,), reference.top_h, (0.4,)),
    ("MinPLogitsWarper", (0.1,), reference.min_p, (0.1,)),
    ("MinPLogitsWarper", (0.99, -INF, 4), reference.min_p, (0.99, 4)),
    ("TypicalLogitsWarper", (0.6,), reference.typical, (0.6,)),
    ("TypicalLogitsWarper", (0.2, -INF, 5), reference.typical, (0.2, 5)),
    ("EpsilonLogitsWarper", (0.05,), reference.epsilon, (0.05,)),
    ("EpsilonLogitsWarper", (0.9, -INF, 3), reference.epsilon, (0.9, 3)),
    ("EtaLogitsWarper", (0.3,), reference.eta, (0.3,)),
]


def encoder_repetition(scores, penalty):
    return reference.repetition(SOURCE.numpy().repeat(2, 0), scores, 1 / penalty)


# Settings that ask for every rule.
EVERYTHING = {
    "sequence_bias": [[[3], -1.0]],
    "encoder_repetition_penalty": 1.2,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[4]],
    "min_length": 5,
    "min_new_tokens": 2,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [2, 1.1],
    "suppress_tokens": [6],
    "begin_suppress_tokens": [7],
    "do_sample": True,
    "temperature": 0.7,
    "top_h": 0.9,
    "top_k": 10,
    "top_p": 0.9,
    "min_p": 0.05,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "watermarking_config": {"bias": 1.0},
    "renormalize_logits": True,
    "eos_token_id": 2,
}
