# SPDX-License-Identifier: Apache-2.0
"""Slow numpy versions of the rules on scores: one row, one token, one plain loop at a time.

They are the truth that each framework's fast rules are tested against. Every function takes
``ids`` [rows, length] and ``scores`` [rows, vocab] (float64 inside) and returns new scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Scores = NDArray[np.float64]

INF = math.inf


def softmax(scores: Scores) -> Scores:
    """Return probabilities of each row.

    Args:
        scores: [rows, vocab].
    """
    out = np.empty_like(scores, dtype=np.float64)
    for row, values in enumerate(scores):
        powers = [math.exp(value - values.max()) for value in values]
        out[row] = [power / sum(powers) for power in powers]
    return out


def log_normalised(ids: Ids, scores: Scores) -> Scores:
    """Return logarithms of probabilities."""
    with np.errstate(divide="ignore"):
        return np.log(softmax(scores))


# -- lengths and ends ----------------------------------------------------------------------------


def without(scores: Scores, tokens: Sequence[int]) -> Scores:
    """Return scores in which some tokens are impossible.

    Args:
        scores: [rows, vocab].
        tokens: Which.
    """
    out = scores.copy()
    for row in out:
        for token in tokens:
            row[token] = -INF
    return out


def only(scores: Scores, tokens: Sequence[int]) -> Scores:
    """Return scores in which only some tokens are possible, all alike.

    Args:
        scores: [rows, vocab].
        tokens: Which.
    """
    out = np.full_like(scores, -INF)
    for row in out:
        for token in tokens:
            row[token] = 0.0
    return out


def min_length(ids: Ids, scores: Scores, length: int, ends: Sequence[int]) -> Scores:
    """No end before `length` tokens."""
    return without(scores, ends) if ids.shape[1] < length else scores.copy()


def forced_first(ids: Ids, scores: Scores, token: int) -> Scores:
    """One token after the start token."""
    return only(scores, [token]) if ids.shape[1] == 1 else scores.copy()


def forced_last(ids: Ids, scores: Scores, max_length: int, ends: Sequence[int]) -> Scores:
    """Given tokens as the last one."""
    return only(scores, ends) if ids.shape[1] == max_length - 1 else scores.copy()


def suppressed_at_begin(ids: Ids, scores: Scores, tokens: Sequence[int], begin: int) -> Scores:
    """Not the given tokens at one length."""
    return without(scores, tokens) if ids.shape[1] == begin else scores.copy()


def decaying_length(
    ids: Ids, scores: Scores, start: int, factor: float, ends: Sequence[int], prompt: int
) -> Scores:
    """Ends become likelier: score + |score| (factor^late - 1), where late counts tokens after the start."""
    out = scores.copy()
    late = ids.shape[1] - prompt - start
    for row in out:
        for end in ends:
            if late > 0 and math.isfinite(row[end]):
                row[end] += abs(row[end]) * (factor**late - 1)
    return out


# -- repetition ----------------------------------------------------------------------------------


def repetition(ids: Ids, scores: Scores, penalty: float, skip: int | Sequence[int] = 0) -> Scores:
    """Tokens that occurred: scores above 0 divided by the penalty, below 0 multiplied.

    `skip` leaves out tokens at the beginning, the same number or one number for each row.
    """
    out = scores.copy()
    for row, values in enumerate(out):
        first = skip if isinstance(skip, int) else skip[row]
        for token in set(ids[row, first:].tolist()):
            if token < len(values):
                values[token] = values[token] * penalty if values[token] < 0 else values[token] / penalty
    return out


def no_repeated_ngram(ids: Ids, scores: Scores, size: int, source: Ids | None = None) -> Scores:
    """No n-gram of `source` (or of the sequence itself) again."""
    out = scores.copy()
    source = ids if source is None else source
    for row, values in enumerate(out):
        sequence, seen = ids[row].tolist(), source[row * len(source) // len(ids)].tolist()
        beginning = sequence[len(sequence) - size + 1 :]
        if len(sequence) < size - 1:
            continue
        for at in range(len(seen) - size + 1):
            if seen[at : at + size - 1] == beginning and seen[at + size - 1] < len(values):
                values[seen[at + size - 1]] = -INF
    return out


def biased_sequences(ids: Ids, scores: Scores, bias: Mapping[tuple[int, ...], float]) -> Scores:
    """A bias for tokens that would complete a sequence."""
    out = scores.copy()
    for row, values in enumerate(out):
        sequence = ids[row].tolist()
        for tokens, amount in bias.items():
            before = list(tokens[:-1])
            if len(before) <= len(sequence) and sequence[len(sequence) - len(before) :] == before:
                values[tokens[-1]] += amount
    return out


def constrained_prefix(
    ids: Ids, scores: Scores, allowed: Callable[[int, Ids], Sequence[int]], beams: int = 1
) -> Scores:
    """Only allowed tokens; where all beams of a row lose all of them, these at 0."""
    mask = np.full_like(scores, -INF)
    for row in range(len(ids)):
        for token in allowed(row // beams, ids[row]):
            mask[row, token] = 0.0
    out = scores + mask
    for first in range(0, len(ids), beams):
        if np.all(out[first : first + beams] == -INF):
            out[first : first + beams] = mask[first : first + beams]
    return out


def finite(ids: Ids, scores: Scores, dtype: type = np.float32) -> Scores:
    """NaN becomes 0, infinities the ends of the dtype's range."""
    out = scores.copy()
    limits = np.finfo(dtype)
    for row in out:
        for token, value in enumerate(row):
            if math.isnan(value):
                row[token] = 0.0
            elif math.isinf(value):
                row[token] = limits.max if value > 0 else limits.min
    return out


# -- filters for sampling ------------------------------------------------------------------------


def _keeping(scores: Scores, kept: Sequence[set[int]]) -> Scores:
    out = np.full_like(scores, -INF)
    for row, tokens in enumerate(kept):
        for token in tokens:
            out[row, token] = scores[row, token]
    return out


def _best(values: Scores, count: int) -> list[int]:
    """Token ids from the highest score down, `count` of them."""
    return sorted(range(len(values)), key=lambda token: -values[token])[:count]


def top_k(ids: Ids, scores: Scores, k: int, keep: int = 1) -> Scores:
    """The k best, and those that score the same as the last of them."""
    kept = []
    for values in scores:
        least = values[_best(values, max(k, keep))[-1]]
        kept.append({token for token, value in enumerate(values) if value >= least})
    return _keeping(scores, kept)


def top_p(ids: Ids, scores: Scores, p: float, keep: int = 1) -> Scores:
    """The fewest best whose probabilities reach p together."""
    kept = []
    for values, probs in zip(scores, softmax(scores), strict=True):
        tokens: set[int] = set()
        mass = 0.0
        for token in _best(values, len(values)):
            if mass < p or len(tokens) < keep:
                tokens.add(token)
            mass += probs[token]
        kept.append(tokens)
    return _keeping(scores, kept)


def top_h(ids: Ids, scores: Scores, share: float, top_n: int = 100) -> Scores:
    """The best, in turn, while their entropies add up to a share of all (of the best `top_n`)."""
    kept = []
    for values in scores:
        best = _best(values, top_n)
        probs = softmax(values[None, best])[0]
        terms = [-p * math.log(p) if p > 0 else 0.0 for p in probs]
        tokens = {best[0]}
        total = 0.0
        for token, term in zip(best, terms, strict=True):
            total += term
            if total > share * sum(terms):
                break
            tokens.add(token)
        kept.append(tokens)
    return _keeping(scores, kept)


def _at_least(scores: Scores, bounds: Sequence[float], keep: int) -> Scores:
    """Tokens whose probability reaches a bound, and the best few in any case."""
    kept = []
    for values, probs, bound in zip(scores, softmax(scores), bounds, strict=True):
        tokens = {token for token, p in enumerate(probs) if p >= bound}
        kept.append(tokens | set(_best(values, keep)))
    return _keeping(scores, kept)


def min_p(ids: Ids, scores: Scores, share: float, keep: int = 1) -> Scores:
    """Tokens at least `share` times as likely as the likeliest."""
    return _at_least(scores, [share * probs.max() for probs in softmax(scores)], keep)


def epsilon(ids: Ids, scores: Scores, bound: float, keep: int = 1) -> Scores:
    """Tokens at least as likely as `bound`."""
    return _at_least(scores, [bound] * len(scores), keep)


def eta(ids: Ids, scores: Scores, bound: float, keep: int = 1) -> Scores:
    """Tokens at least as likely as min(bound, sqrt(bound) exp(-entropy))."""
    bounds = [min(bound, math.sqrt(bound) * math.exp(-_entropy(probs))) for probs in softmax(scores)]
    return _at_least(scores, bounds, keep)


def typical(ids: Ids, scores: Scores, mass: float, keep: int = 1) -> Scores:
    """Tokens whose surprise is nearest to the entropy, until their mass is reached."""
    kept = []
    for probs in softmax(scores):
        entropy = _entropy(probs)
        distance = [abs(-math.log(p) - entropy) if p > 0 else INF for p in probs]
        order = sorted(range(len(probs)), key=lambda token: distance[token])
        tokens: set[int] = set()
        total = 0.0
        for token in order:
            if total < mass or len(tokens) < keep:
                tokens.add(token)
            total += probs[token]
        kept.append(tokens)
    return _keeping(scores, kept)


def _entropy(probs: Scores) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


# -- rules of single families, watermarks --------------------------------------------------------


def forced_tokens(ids: Ids, scores: Scores, at: Mapping[int, int]) -> Scores:
    """Given tokens at given positions."""
    token = at.get(ids.shape[1])
    return scores.copy() if token is None else only(scores, [token])


def alternating_codebooks(ids: Ids, scores: Scores, start: int, before: int, size: int) -> Scores:
    """Tokens of the first codebook at every second position from `start`, of the second one between."""
    first = set(range(before, before + size))
    second = set(range(before + size, scores.shape[1]))
    turn = first if (ids.shape[1] - start) % 2 == 0 else second
    return _keeping(scores, [turn] * len(scores))


def likely_end(ids: Ids, scores: Scores, ends: Sequence[int], bound: float) -> Scores:
    """Nothing but the ends where one of them is likelier than a bound."""
    out = scores.copy()
    for row, probs in enumerate(softmax(scores)):
        if any(probs[end] > bound for end in ends):
            out[row] = [value if token in ends else -INF for token, value in enumerate(scores[row])]
    return out


def time_stamps(
    ids: Ids, scores: Scores, no_stamps: int, end: int, begin: int, latest: int | None, joint: bool = True
) -> Scores:
    """Whisper's time stamps: in pairs, never back, one first, one where all are likelier than any text."""
    out = scores.copy()
    first = no_stamps + 1
    for row, values in enumerate(out):
        said = ids[row, begin:].tolist()
        values[no_stamps] = -INF
        last = bool(said) and said[-1] >= first
        before = len(said) < 2 or said[-2] >= first
        for token in range(len(values)):
            stamp = token >= first
            if last and (stamp if before else token < end):
                values[token] = -INF
            seen = [other for other in said if other >= first]
            if stamp and seen and token < seen[-1] + (0 if last and not before else 1):
                values[token] = -INF
            too_late = latest is not None and token > first + latest
            if ids.shape[1] == begin and (not stamp or too_late):
                values[token] = -INF
        mass = sum(math.exp(value) for value in values[first:])
        if joint and mass > math.exp(max(values[:first])):
            values[:first] = -INF
    return out


def green_tokens(
    ids: Ids, scores: Scores, green: Callable[[Sequence[int]], set[int]], bias: float, own: bool, width: int
) -> Scores:
    """A bias for green tokens; `green` gives the list of a window of tokens (with the new one, if `own`)."""
    out = scores.copy()
    for row, values in enumerate(out):
        sequence = ids[row].tolist()
        if not own:
            chosen = green(sequence[-width:])
        else:
            tried = _best(values, min(40, len(values)))
            chosen = {token for token in tried if token in green([*sequence, token][-width:])}
        for token in chosen:
            values[token] += bias
    return out


def tournament(
    ids: Ids, scores: Scores, start: int, ngram: int, keys: Sequence[int], table: Sequence[int], history: int
) -> Scores:
    """SynthID's tournament: of two tokens drawn in each round, one that threw 1 beats one that threw 0."""

    def mix(value: int, item: int) -> int:
        return ((value + item) * 6364136223846793005 + 1) % 2**64

    def signed(value: int) -> int:
        return value - 2**64 if value >= 2**63 else value

    def hash_of(context: Sequence[int]) -> int:
        value = 1
        for token in context:
            value = mix(value, token)
        return value

    out = scores.astype(np.float64)
    for row, shares in enumerate(softmax(scores)):
        probs = shares.tolist()
        said = [0] * (ngram - 1) + ids[row, start:].tolist()
        hashes = [hash_of(said[at : at + ngram - 1]) for at in range(len(said) - ngram + 2)]
        if hashes[-1] in hashes[:-1][-history:]:
            continue
        for key in keys:
            throws = [
                table[signed(mix(mix(hashes[-1], token), key)) % len(table)] for token in range(len(probs))
            ]
            heads = sum(p for p, throw in zip(probs, throws, strict=True) if throw)
            # Wins of a token: against itself or its like, half of the draws each; 1 against 0, all of them.
            wins = [heads + 2 * (1 - heads) if throw else 1 - heads for throw in throws]
            probs = [p * share for p, share in zip(probs, wins, strict=True)]
        lowest = np.finfo(np.float32).min
        out[row] = [math.log(p) if p > 0 else lowest for p in probs]
    return out


# -- relative positions ----------------------------------------------------------------------------


def relative_position_bucket(
    relative_position: int, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> int:
    """Return which entry of T5's bias table one relative position uses (Raffel et al. 2020, section 2.1).

    Args:
        relative_position: Position of the key minus that of the query.
        bidirectional: Keys after the query have the upper half of the table.
        num_buckets: Size of the table.
        max_distance: First distance that shares the last bucket of its direction.
    """
    buckets = num_buckets // 2 if bidirectional else num_buckets
    first = buckets if bidirectional and relative_position > 0 else 0
    distance = abs(relative_position) if bidirectional else max(-relative_position, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    # float32, as published: at the edges of buckets the rounding decides.
    octaves = np.log(np.float32(distance) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    return first + min(exact + int(octaves * np.float32(buckets - exact)), buckets - 1)
