"""Two word lists that know praise from blame: rewards that need no data and no training. Change them as you like.

VADER (Hutto and Gilbert, 2014) has 7,500 words that ten people each rated; the pattern lexicon (De Smedt and Daelemans,
2012), which TextBlob carries, has 2,900 adjectives of product reviews. Neither was made from the other.
"""

from functools import cache
from typing import Any


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def praise(xs: list[str], ys: list[str]) -> list[float]:
    """VADER's verdict on each response, from -1 (blame) to 1 (praise)."""
    return [_vader().polarity_scores(y)["compound"] for y in ys]


def blame(xs: list[str], ys: list[str]) -> list[float]:
    """The same the other way round."""
    return [-reward for reward in praise(xs, ys)]


def pattern(xs: list[str], ys: list[str]) -> list[float]:
    """The pattern lexicon's verdict, from -1 to 1: a judge that takes no part in training."""
    from textblob import TextBlob

    return [TextBlob(y).sentiment.polarity for y in ys]
