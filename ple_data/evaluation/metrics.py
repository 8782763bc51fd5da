"""What `ple eval` measures, each as something that gives an interval and a paired difference over queries.

Ratios (mean reward, length, perplexity, ...) and BLEU are functions of sums over queries, so that a bootstrap draw
adds up rows of numbers and reads no text again. Words of distinct-n are those between white space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ple_data.common.extras import need
from ple_data.evaluation.intervals import bootstrap, jackknife
from schemas.reports import Estimate

BLEU_ORDER = 4


@dataclass(frozen=True)
class SumMetric(ABC):
    """A function of sums over queries. sums: [queries, k]. Made by its subclasses."""

    sums: np.ndarray

    @abstractmethod
    def of(self, totals: np.ndarray) -> np.ndarray:
        """[draws, k] totals -> [draws] values."""

    def at(self, places: np.ndarray) -> np.ndarray:
        """Values on drawn queries: [draws, queries] places -> [draws]."""
        return self.of(np.stack([column[places].sum(axis=-1) for column in self.sums.T], axis=-1))

    def estimate(self, seed: int) -> Estimate:
        """Its value with a 95 % interval."""
        return bootstrap(self.at, len(self.sums), seed=seed)

    def less(self, other: Metric, seed: int) -> Estimate:
        """Its value less that of the other policy on the same queries, with a 95 % interval."""
        assert isinstance(other, SumMetric)
        return bootstrap(lambda places: self.at(places) - other.at(places), len(self.sums), seed=seed)


class Mean(SumMetric):
    """Sum of a value over the number of responses or tokens: sums are [value, number]; 0 where there are none."""

    def of(self, totals: np.ndarray) -> np.ndarray:
        return totals[:, 0] / np.maximum(totals[:, 1], 1)


class Perplexity(Mean):
    """exp of the negative log-likelihood of a token: sums are [nats, tokens]."""

    def of(self, totals: np.ndarray) -> np.ndarray:
        return np.exp(super().of(totals))


class Bleu(SumMetric):
    """sacrebleu's corpus BLEU, 0 to 100: sums are [response words, reference words, 4 matches, 4 totals]."""

    def of(self, totals: np.ndarray) -> np.ndarray:
        from sacrebleu.metrics import BLEU

        split = 2 + BLEU_ORDER
        rows = totals.astype(np.int64).tolist()
        scores = [BLEU.compute_bleu(r[2:split], r[split:], r[0], r[1], smooth_method="exp").score for r in rows]
        return np.array(scores)


def need_bleu() -> None:
    """Raise UsageError where sacrebleu is missing."""
    need("sacrebleu", "BLEU against references is computed with")


def bleu(responses: Sequence[Sequence[str]], references: Sequence[str]) -> tuple[Bleu, str]:
    """Corpus BLEU of each query's responses against its reference, and sacrebleu's signature."""
    need_bleu()
    from sacrebleu.metrics import BLEU

    corpus = BLEU(force=True)
    flat = [(response, reference) for ys, reference in zip(responses, references, strict=True) for response in ys]
    corpus.corpus_score([response for response, _ in flat], [[reference for _, reference in flat]])
    by_sentence = BLEU(effective_order=True, force=True)  # changes the sentence's score, which is not used
    sums = np.zeros((len(responses), 2 + 2 * BLEU_ORDER))
    for row, (ys, reference) in enumerate(zip(responses, references, strict=True)):
        for response in ys:
            score = by_sentence.sentence_score(response, [reference])
            sums[row] += [score.sys_len, score.ref_len, *score.counts, *score.totals]
    return Bleu(sums), corpus.get_signature().format()


@dataclass(frozen=True)
class Distinct:
    """Distinct n-grams of words over all n-grams of words of all responses (Li et al. 2016, distinct-n)."""

    value: float
    without: np.ndarray  # [queries]: the value without each query

    def estimate(self, seed: int) -> Estimate:
        found = jackknife(self.value, self.without)
        return found.model_copy(update={"low": max(0.0, found.low), "high": min(1.0, found.high)})

    def less(self, other: Metric, seed: int) -> Estimate:
        assert isinstance(other, Distinct)
        return jackknife(self.value - other.value, self.without - other.without)


Metric = SumMetric | Distinct
"""A corpus statistic of one policy over queries in a fixed order."""


def distinct(responses: Sequence[Sequence[str]], n: int) -> Distinct:
    """distinct-n of each query's responses together; 0 where there is no n-gram."""
    grams = [[gram for y in ys for gram in _ngrams(y.split(), n)] for ys in responses]
    sizes = np.array([len(own) for own in grams])
    queries_with = Counter(gram for own in grams for gram in set(own))
    only_here = np.array([sum(queries_with[gram] == 1 for gram in set(own)) for own in grams])
    total = int(sizes.sum())
    without = (len(queries_with) - only_here) / np.maximum(total - sizes, 1)
    return Distinct(len(queries_with) / max(total, 1), without)


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))
