# SPDX-License-Identifier: Apache-2.0
"""Group and constrained beam search in plain Python, one sequence at a time, as published up to 2025.

Slow on purpose: lists of tokens, a list of the best sequences, no tensors. What differs from the published
code is said where it does.
"""

import math

DEAD = -1e9


class Best:
    """The best `size` sequences that have ended."""

    def __init__(self, size, penalty, early, most):
        self.size, self.penalty, self.early, self.most = size, penalty, early, most
        self.kept = []

    def add(self, tokens, total):
        score = total / len(tokens) ** self.penalty
        if len(self.kept) < self.size or score > min(self.kept)[0]:
            self.kept.append((score, tokens))
            self.kept.sort(key=lambda one: -one[0])
            del self.kept[self.size :]

    def is_done(self, best_total, length):
        if len(self.kept) < self.size:
            return False
        if self.early is True:
            return True
        if self.early == "never" and self.penalty > 0:
            length = self.most
        return min(self.kept)[0] >= best_total / length**self.penalty


def ranked(candidates, count):
    return sorted(candidates, key=lambda one: -one[0])[:count]


def group_search(
    log_probs, *, beams, groups, diversity, ends, most, penalty=1.0, early=False, pad=0, wanted=1
):
    """Return the `wanted` best (score, new tokens), the ends included.

    Args:
        log_probs: Takes new tokens so far, returns the list of log-probabilities of the next.
    """
    size = beams // groups
    running = [[(0.0 if i == 0 else DEAD, []) for i in range(size)] for _ in range(groups)]
    best = [Best(size, penalty, early, most) for _ in range(groups)]
    done = [False] * groups
    for length in range(1, most + 1):
        chosen = []
        for g in range(groups):
            if done[g]:
                chosen += [pad] * size
                continue
            candidates = []
            for total, tokens in running[g]:
                for token, value in enumerate(log_probs(tokens)):
                    less = diversity * chosen.count(token)
                    candidates.append((total + value - less, tokens, token))
            candidates = ranked(candidates, max(2, 1 + len(ends)) * size)
            running[g] = []
            for rank, (total, tokens, token) in enumerate(candidates):
                if token in ends:
                    if rank < size:
                        best[g].add([*tokens, token], total)
                elif len(running[g]) < size:
                    running[g].append((total, [*tokens, token]))
            chosen += [tokens[-1] for _, tokens in running[g]]
            done[g] = best[g].is_done(candidates[0][0], length)
        if all(done):
            break
    for g in range(groups):
        if not done[g]:
            for total, tokens in running[g]:
                best[g].add(tokens, total)
    return ranked([one for group in best for one in group.kept], wanted)


class Progress:
    """How far a text has come with phrases; each is a list of choices."""

    def __init__(self, phrases):
        self.left, self.done, self.begun, self.matched = list(phrases), 0, None, []
        self.longest = max(len(choice) for phrase in phrases for choice in phrase)

    @property
    def complete(self):
        return not self.left and self.begun is None

    def feed(self, token):
        if self.complete:
            return
        if self.begun is None:
            for phrase in self.left:
                if any(choice[0] == token for choice in phrase):
                    self.left.remove(phrase)
                    self.begun, self.matched = phrase, []
                    break
            else:
                return
        matched = [*self.matched, token]
        if not any(choice[: len(matched)] == matched for choice in self.begun):
            self.left.append(self.begun)
            self.begun, self.matched = None, []
        elif matched in self.begun:
            self.done, self.begun, self.matched = self.done + 1, None, []
        else:
            self.matched = matched

    def next_tokens(self):
        found = []
        for phrase in [self.begun] if self.begun is not None else self.left:
            at = len(self.matched)
            for choice in phrase:
                if choice[:at] == self.matched and choice[at] not in found:
                    found.append(choice[at])
        return found

    def bank(self):
        begun = 0
        if self.begun is not None:
            # What is missing is counted for the longest choice of the phrase.
            missing = max(len(choice) for choice in self.begun) - len(self.matched)
            begun = self.longest - missing
        return self.done * self.longest + begun


def progress_of(phrases, tokens):
    progress = Progress(phrases)
    for token in tokens:
        progress.feed(token)
    return progress


def constrained_search(log_probs, phrases, *, prompt, beams, ends, most, penalty=1.0, early=False, wanted=1):
    """Return the `wanted` best (score, new tokens).

    Where the published code lets an unfulfilled sequence of a higher score come before a fulfilled one, the
    fulfilled ones come first here.
    """

    def state(tokens):
        return progress_of(phrases, [*prompt, *tokens])

    running = [(0.0 if i == 0 else DEAD, []) for i in range(beams)]
    best, done = Best(beams, penalty, early, most), False
    for length in range(1, most + 1):
        following = [log_probs(tokens) for _, tokens in running]
        candidates = ranked(
            [
                (total + value, tokens, token)
                for (total, tokens), values in zip(running, following, strict=True)
                for token, value in enumerate(values)
            ],
            max(2, 1 + len(ends)) * beams,
        )
        going = []
        for rank, (total, tokens, token) in enumerate(candidates):
            if token in ends:
                if rank < beams and state(tokens).complete:
                    best.add([*tokens, token], total)
            elif len(going) < beams:
                going.append((total, [*tokens, token]))
        seen = [tokens for _, tokens in going]
        for (total, tokens), values in zip(running, following, strict=True):
            before = state(tokens)
            for token in [] if before.complete else before.next_tokens():
                if [*tokens, token] not in seen:
                    seen.append([*tokens, token])
                    going.append((total + values[token], [*tokens, token]))
        if len(going) > beams:
            banks = [state(tokens).bank() for _, tokens in going]
            order = sorted(range(len(going)), key=lambda i: -(100 * banks[i] + going[i][0]))
            ranks, count, last = [], 0, None
            for i in order:
                count = count + 1 if banks[i] == last else 0
                last = banks[i]
                ranks.append(count)
            order = [i for _, i in sorted(zip(ranks, order, strict=True), key=lambda pair: pair[0])]
            going = [going[i] for i in order[:beams]]
        running = going
        done = best.is_done(candidates[0][0], length)
        if done:
            break
    lacking = []
    if not done:
        for total, tokens in running:
            if state(tokens).complete:
                best.add(tokens, total)
            else:
                lacking.append((total / len(tokens) ** penalty, tokens))
    return (best.kept + ranked(lacking, beams))[:wanted]


def close(found, expected):
    """Whether two scores are the same but for rounding."""
    return math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-4)
