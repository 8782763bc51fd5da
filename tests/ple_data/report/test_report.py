"""`ple report`: its numbers against plain Python and scipy, what it leaves out with a word, the same bytes twice."""

import math
import re
import statistics as plain
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

import cli
from ple_data.report import figures, svg, training
from ple_data.report import round_tables as statistics
from ple_data.report.evaluation import evaluations, judged
from ple_data.report.page import report
from ple_data.report.pairs import LONGEST_TEXT, clipped, sample_pairs, visible, word_difference
from ple_data.report.section import side
from ple_data.report.sources import RewardModel, Sources
from ple_data.storage.parquet import save_rows
from schemas.errors import DamagedError, UsageError
from schemas.reports import EvalReport, JudgeReport
from schemas.tables import read_table
from tests.run_dir import ALPHA, TAU0, add_pairs, make_results, make_run, plain_rows
from tests.tables import table

# Numbers


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """60 pairs of 2 rounds with two samples a query, random rewards and lengths."""
    generator = np.random.default_rng(3)
    return [
        {
            "query_id": f"q{index // 2}",
            "round": index // 30,
            "sample": index % 2,
            "y_ids": [1] * int(generator.integers(1, 12)),
            "y_prompt_ids": [1] * int(generator.integers(1, 12)),
            "s": float(np.float32(generator.normal())),
            "s_prompt": float(np.float32(generator.normal())),
        }
        for index in range(60)
    ]


def frame(rows: list[dict]) -> pl.LazyFrame:
    return pl.DataFrame(pl.from_arrow(table("pairs", rows))).lazy()


def test_intervals_are_those_of_the_queries_means(rows):
    found = statistics.rounds(frame(rows), TAU0, ALPHA)
    for t in (0, 1):
        mine = [row for row in rows if row["round"] == t]
        margins: dict[str, list[float]] = {}
        for row in mine:
            margins.setdefault(row["query_id"], []).append(row["s_prompt"] - row["s"])
        means = [plain.fmean(values) for values in margins.values()]
        assert found[t]["mean_margin"] == pytest.approx(plain.fmean(means))
        assert found[t]["half_margin"] == pytest.approx(1.959964 * plain.stdev(means) / math.sqrt(15))
    assert statistics.rounds(frame(rows[:1]), TAU0, ALPHA)[0]["half_s"] is None


def test_histogram_counts_every_pair_once_in_its_set_and_bin(rows):
    found = statistics.margins(frame(rows), TAU0, ALPHA)
    margins = [row["s_prompt"] - row["s"] for row in rows]
    low, high = np.quantile(margins, statistics.TAILS)
    assert found.edges[0] == pytest.approx(low)
    assert found.edges[-1] == pytest.approx(high)
    for t, tau in ((0, TAU0), (1, TAU0 * ALPHA)):
        mine = [row["s_prompt"] - row["s"] for row in rows if row["round"] == t]
        assert sum(found.counts[t]["rank"]) == sum(margin > tau for margin in mine)
        assert sum(found.counts[t]["wsft"]) == sum(margin <= tau for margin in mine)
        inner = [sum(found.counts[t][kind][bin] for kind in ("rank", "wsft")) for bin in range(1, 39)]
        assert inner == np.histogram(mine, np.array(found.edges)[1:40])[0].tolist()


def test_one_margin_for_all_still_has_a_histogram():
    found = statistics.margins(frame([{"s": 0.0, "s_prompt": 1.0}] * 3), TAU0, ALPHA)
    assert sum(found.counts[0]["rank"]) == 3


def test_rewards_by_length_are_the_means_of_each_bin(rows):
    for arm, reward in (("y", "s"), ("y_prompt", "s_prompt")):
        mine = [row for row in rows if row["round"] == 1]
        found = statistics.rewards_by_length(frame(rows), 1)[arm]
        assert sum(row["rows"] for row in found) == len(mine)
        lengths = [row["length"] for row in found]
        assert lengths == sorted(lengths)
        by_length = sorted(mine, key=lambda row: len(row[f"{arm}_ids"]))
        start = 0
        for group in found:  # bins are runs of the responses in the order of their length
            part = by_length[start : start + group["rows"]]
            start += group["rows"]
            assert group["mean"] == pytest.approx(plain.fmean(row[reward] for row in part))
            assert group["length"] == pytest.approx(plain.fmean(len(row[f"{arm}_ids"]) for row in part))
            if len(part) > 1:
                assert group["half"] == pytest.approx(clustered_half([(row["query_id"], row[reward]) for row in part]))


def clustered_half(rewards: list[tuple[str, float]]) -> float:
    """1.96 standard errors of a mean whose residuals are summed by query before they are squared."""
    mean, sums = plain.fmean(value for _, value in rewards), {}
    for query, value in rewards:
        sums[query] = sums.get(query, 0.0) + value - mean
    if len(sums) == 1:
        return 0.0
    square = sum(value**2 for value in sums.values()) * len(sums) / (len(sums) - 1)
    return 1.959964 * math.sqrt(square) / len(rewards)


def test_the_same_response_twice_does_not_narrow_rewards_against_length():
    once = [{"query_id": f"q{n}", "y_ids": [7] * 3, "s": float(n % 4)} for n in range(12)]
    twice = [row | {"sample": sample} for row in once for sample in (0, 1)]
    (single,), (double,) = (statistics.rewards_by_length(frame(rows), 0)["y"] for rows in (once, twice))
    assert double["half"] == pytest.approx(single["half"])
    assert single["half"] == pytest.approx(1.959964 * plain.stdev(n % 4 for n in range(12)) / math.sqrt(12))


@given(st.integers(1, 500).flatmap(lambda whole: st.tuples(st.integers(0, whole), st.just(whole))))
def test_wilson_is_scipys(counts):
    found = binomtest(*counts).proportion_ci(method="wilson")
    assert statistics.wilson(*counts) == (pytest.approx(found.low, abs=1e-9), pytest.approx(found.high, abs=1e-9))


def test_figures_draw_the_numbers_they_are_given(rows):
    found = statistics.rounds(frame(rows), TAU0, ALPHA)
    with svg.style():
        axes = figures.rewards(found).axes[0]
        guided, without = (container.lines[0].get_ydata() for container in axes.containers)
        gap = figures.gap(found).axes[0]
        lengths = figures.lengths(found).axes[0]
    assert guided.tolist() == [row["mean_s_prompt"] for row in found]
    assert without.tolist() == [row["mean_s"] for row in found]
    dashed = next(line for line in gap.lines if line.get_linestyle() == "--")
    assert list(dashed.get_ydata()) == [TAU0, TAU0 * ALPHA]
    assert lengths.get_ylim()[0] == 0
    assert lengths.get_ylim()[1] > 1.1 * max(line.get_ydata().max() for line in lengths.lines)


def test_figures_of_nothing_but_zeros_are_drawn(rows):
    found = statistics.rounds(frame([row | {"y_ids": [], "y_prompt_ids": []} for row in rows]), TAU0, ALPHA)
    with svg.style():
        assert figures.lengths(found).axes[0].get_ylim() == (0, 1)


def test_training_curves_run_through_all_rounds(tmp_path):
    run = make_run(tmp_path / "run", [plain_rows(4), plain_rows(4, 1)])
    steps, borders = training.numbered(Sources(run).metrics)
    assert borders == {0: 0, 1: 10}
    assert training.curves_of(steps, {"loss": "loss", "none": "mean_logps_rank_y"}, 5) == {
        "loss": [(3.0, -2.0), (8.0, -7.0), (13.0, -2.0), (18.0, -7.0)]
    }


# The sample of pairs


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=4), limit=st.integers(1, 50))
def test_the_sample_is_bounded_and_fair(counts, limit):
    rows = [{"round": t, "query_id": f"q{t}-{i}", "s_prompt": float(i)} for t, n in enumerate(counts) for i in range(n)]
    found = sample_pairs(frame(rows), TAU0, ALPHA, limit)
    assert len(found) <= limit
    keys = [(row["round"], row["query_id"]) for row in found]
    assert len(set(keys)) == len(keys)
    for t, count in enumerate(counts):
        margins = [row["margin"] for row in found if row["round"] == t]
        assert margins == sorted(margins, reverse=True)
        each = limit // len(counts)
        assert len(margins) >= min(count, each)
        if each >= 2 and count >= 2:
            assert (margins[-1], margins[0]) == (-0.25, count - 1 - 0.25)


TEXT = st.text(alphabet="ab \n\t<&\u202e\u2028\u200d\x00é世", max_size=40)


@given(TEXT, TEXT)
def test_word_difference_loses_nothing_and_shares_the_same_words(a, b):
    left, right = word_difference(a, b)
    assert "".join(text for _, text in left) == a
    assert "".join(text for _, text in right) == b
    shared = [[word for differs, text in side if not differs for word in text.split()] for side in (left, right)]
    assert shared[0] == shared[1]


def test_word_difference_by_hand():
    left, right = word_difference("The film was bad.", "The film was very good.")
    assert left == [(False, "The film was "), (True, "bad.")]
    assert right == [(False, "The film was "), (True, "very good.")]


def lines_run(function: Callable[[], object], limit: int) -> int:
    """Lines of Python that `function` runs; an AssertionError once they are more than `limit`."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        assert count <= limit
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("very " * 790, "very " * 700 + "good."),
        ("a b " * 990, "b c " * 990),
        (" ".join(f"a x{n}" for n in range(600)), " ".join(f"a y{n}" for n in range(600))),
        (" ".join(f"a x{n}" for n in range(39)), " ".join(f"a y{n}" for n in range(39))),
        (" ".join(map(chr, range(0x4E00, 0x4E00 + 1900))), " ".join(map(chr, range(0x4E00, 0x4E00 + 3800, 2)))),
    ],
    ids=["collapsed", "two words", "one word in two", "the most that is compared", "many blocks"],
)
def test_comparing_repetitive_texts_takes_few_steps(a, b):
    lines_run(lambda: word_difference(a, b), limit=1_000_000)
    for text, pieces in zip((a, b), word_difference(a, b), strict=True):
        assert "".join(piece for _, piece in pieces) == text


def test_a_collapsed_text_is_marked_between_its_common_ends():
    left, right = word_difference("So " + "very " * 600 + "good.", "So " + "very " * 500 + "bad but very good.")
    assert left == [(False, "So " + "very " * 500), (True, "very " * 98 + "very"), (False, " "), (False, "very good.")]
    assert right == [(False, "So " + "very " * 500), (True, "bad but"), (False, " "), (False, "very good.")]


@given(st.text())
def test_what_is_visible_holds_no_control_or_bidi_character(text):
    shown = visible(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]", shown)
    assert visible(shown) == shown


def test_visible_by_hand():
    assert visible("a\u202eb\u2028\x1b[0m") == "a⟨U+202E⟩b⟨U+2028⟩⟨U+001B⟩[0m"
    assert visible("line\n\tnext 👩\u200d💻 \u3000") == "line\n\tnext 👩\u200d💻 \u3000"
    hidden = "\U000e0041\U000e0000\U000e0100\u00ad\u3164\u115f\uffa0\u2065\ue000\u180e"
    assert visible(hidden) == "".join(f"⟨U+{ord(character):04X}⟩" for character in hidden)
    assert visible("é世🩷️") == "é世🩷️"
    assert clipped("x" * (LONGEST_TEXT + 7)).endswith("x … (7 more characters)")


# The page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run", [plain_rows(30), plain_rows(30, 1)])


def test_the_whole_page_is_there_and_the_same_the_second_time(run, tmp_path):
    """Every section with its figures and tables; numbers of the tables are those of the records."""
    options = make_results(tmp_path)
    assert report(run, **options) == str(run / "report.html")
    page = (run / "report.html").read_text()
    images = sorted(path.name for path in (run / "report-figures").iterdir())
    before = [(run / "report-figures" / name).read_bytes() for name in images]
    report(run, **options)
    assert (run / "report.html").read_text() == page
    assert [(run / "report-figures" / name).read_bytes() for name in images] == before
    assert all(image.startswith(b"\x89PNG") for image in before)
    assert images == sorted(
        f"{name}.png"
        for name in (
            *("rewards", "gap", "margins", "rank-share", "rewards-by-length", "lengths", "loss", "drift"),
            *("purity-by-margin", "smallest-pure", "win-rates", "stages"),
        )
    )
    for text in (
        "kind harmful",
        "1.250 [1.000, 1.500]",
        "60 in 2 rounds",
        "τ_t = 0.4 · 0.5^t",
        "Nothing of policy.",
        "base says no",
    ):
        assert text in page
    assert "No evaluation" not in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert not re.search(r"(fill|stroke): ?#", page)


def test_a_secret_in_an_address_is_not_shown(tmp_path):
    run = make_run(tmp_path / "run", [plain_rows(3)], reward_model="https://h/r?token=sesame")
    page = Path(report(run)).read_text()
    assert "<dd>https://h/r</dd>" in page
    assert "sesame" not in page


def test_a_bare_data_directory_shows_what_is_there(tmp_path):
    """Through the command, whose stdout is the page's path."""
    add_pairs(tmp_path / "data", [plain_rows(5)])
    words = [
        "report",
        str(tmp_path / "data"),
        "--output",
        str(tmp_path / "page.html"),
        "--tau0",
        "0.1",
        "--alpha",
        "0.5",
    ]
    result = CliRunner().invoke(cli.ple, words)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    for text in ("No metrics", "No purity.json", "No evaluation given", "No verdicts given", "No stages.json"):
        assert text in page
    assert "τ_t = 0.1 · 0.5^t" in page
    assert "guided answer 4" in page.replace("<mark>", "").replace("</mark>", "")


def test_a_baselines_page_knows_no_threshold_and_no_sets(tmp_path):
    """Unless they are asked for; a baseline's metrics are its loss alone."""
    run = make_run(tmp_path / "run", [plain_rows(30)], baseline={"method": "raft"})
    pl.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}).write_parquet(run / "metrics" / "round=000.parquet")
    page = Path(report(run)).read_text()
    for text in ("τ_t =", "threshold", "Eq. 6", "rank set", "weighted SFT", "tag rank", "by-set", "is not trained"):
        assert text not in page.split("<style>")[0] + page.split("</style>")[1].split("<script>")[0], text
    assert "Trained by raft: it knows no τ_t and no sets." in page
    assert "The loss of the method that trained" in page
    assert "No drift: ple-train alone measures it, and only where it trains an adapter." in page
    assert (run / "report-figures" / "lowered-share.png").exists()
    assert 'data-set="rank"' in Path(report(run, tau0=0.1)).read_text()


@pytest.mark.parametrize(
    ("train", "said", "sets"),
    [
        ({"without": "rank"}, "Trained by PLE without rank: it has no rank set", False),
        ({"without": "wsft"}, "Trained by PLE without wsft: pairs in the weighted-SFT set", True),
        ({"objective": "ple-residual", "without": "rank"}, "Trained by ple-residual without rank: it has no", False),
        ({"objective": "ple-residual"}, "Trained by ple-residual: the page shows pairs by their margin", True),
        ({"objective": "dpo"}, "Trained by dpo: it knows no τ_t", False),
    ],
)
def test_a_page_says_which_set_its_method_leaves_out(tmp_path, train, said, sets):
    run = make_run(tmp_path / "run", [plain_rows(30)], train=train)
    page = Path(report(run)).read_text()
    assert said in page
    assert ('data-set="rank"' in page) == ("τ_t =" in page) == ("rank set:" in page) == sets
    assert ("Terms of Eq. 6" in page) == ("no lower bound" in page) == ("objective" not in train)
    assert ("The loss of the method that trained" in page) == (train.get("objective") == "dpo")


@pytest.mark.parametrize(
    ("keys", "method", "rate"),
    [
        ({}, "PLE", "0.0001"),
        ({"train": {"learning_rate": 0.001, "trust_region": 0.3, "normalize_wsft": True}},
         "PLE with --trust-region 0.3, --normalize-wsft", "0.001"),
        ({"train": {"without": "wsft", "sft_anchor": 0.5}}, "PLE without wsft with --sft-anchor 0.5", "0.0001"),
        ({"train": {"objective": "dpo", "beta": 0.3, "form": "means"}}, "dpo with --beta 0.3, --form means", "0.0001"),
        ({"train": {"objective": "ple-residual"}}, "ple-residual", "0.0001"),
        ({"baseline": {"method": "raft", "learning_rate": 3e-5}, "train": {"trust_region": 0.3}}, "raft", "3e-05"),
    ],
)  # fmt: skip
def test_facts_say_how_the_run_departs_from_the_paper(tmp_path, keys, method, rate):
    run = make_run(tmp_path / "run", [plain_rows(3)], seed=7, **keys)
    found = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", Path(report(run)).read_text()))
    assert (found["method"], found["learning rate"], found["seed"]) == (method, rate, "7")


def test_a_run_whose_name_looks_like_a_pattern_is_read_itself(tmp_path):
    own = Sources(make_run(tmp_path / "run[1]", [plain_rows(30)]))
    assert list(own.metrics) == [0]


def test_a_link_in_place_of_the_figures_is_not_emptied(run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.png").write_bytes(b"")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report-figures").symlink_to(tmp_path / "photos")
    with pytest.raises(DamagedError, match="links lead to"):
        report(run, output=tmp_path / "page" / "report.html")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["mine.png"]


def test_pages_in_one_folder_keep_their_figures_and_drop_old_ones(run, tmp_path):
    report(run, output=tmp_path / "a.html")
    first = (tmp_path / "a-figures" / "rewards.png").read_bytes()
    add_pairs(tmp_path / "data", [plain_rows(5)])
    report(tmp_path / "data", output=tmp_path / "b.html")
    assert (tmp_path / "a-figures" / "rewards.png").read_bytes() == first
    assert "loss.png" in {path.name for path in (tmp_path / "a-figures").iterdir()}
    report(tmp_path / "data", output=tmp_path / "a.html")
    assert {path.name for path in (tmp_path / "a-figures").iterdir()} == {
        path.name for path in (tmp_path / "b-figures").iterdir()
    }


def test_a_run_that_has_just_begun(tmp_path):
    """No pairs, no stage finished: no figure of pairs, and a word."""
    run = make_run(tmp_path / "run", [])
    (run / "stages.json").write_text('{"stages": [{"stage": "gen", "round": 0, "seconds": null, "exit_code": null}]}')
    page = Path(report(run)).read_text()
    assert "No pairs yet" in page
    assert "running, or killed" in page
    assert "No stage has ended yet" in page
    assert "Time by stage" not in page


def test_many_rounds_of_one_pair(tmp_path):
    add_pairs(tmp_path, [plain_rows(1, t) for t in range(14)])
    assert "10 of 14 rounds." in Path(report(tmp_path)).read_text()
    assert figures.shown_rounds(range(14))[0] == 0
    assert figures.shown_rounds(range(14))[-1] == 13


def test_a_reward_model_trained_where_it_is_marked_or_scored_the_pairs(tmp_path):
    """Of the others nobody said that they are independent. The pairs of `make_run` name judge@0123456789ab."""
    run, results = make_run(tmp_path / "run", [plain_rows(3)]), make_results(tmp_path)
    page = Path(report(run, **results)).read_text()
    assert '<th scope="col">R1 (trained)</th>' in page
    assert "R1: reward by policy, which trained a policy." in page
    assert "R2: reward by second, not marked as having trained a policy." in page
    assert "ndependent" not in page
    path = tmp_path / "eval" / "eval.json"
    path.write_text(path.read_text().replace('"second"', '"judge@0123456789ab"'))
    second = Sources(run, results["evals"]).reward_models["judge@0123456789ab"]
    assert second.title == "R2 (trained)"
    assert second.legend == "R2: reward by judge@0123456789ab, which scored the pairs of this run."


def test_rewards_of_cases_say_whose_they_are(run, tmp_path):
    """They share the numbers of the evaluations: policy is R1 and second R2 there."""
    results = make_results(tmp_path)
    page = Path(report(run, **results)).read_text().partition('<section id="cases"')[2]
    assert "3 tokens, stop, R2 0.5, R3 -1.25" in page
    assert "R1" not in page
    assert "R2: reward by second, not marked as having trained a policy." in page
    assert "R3: reward by third, which trained a policy." in page


def test_what_is_wrong_is_one_sentence(run, tmp_path):
    [case, _] = read_table(make_results(tmp_path / "results")["cases"] / "cases.parquet", "cases").to_pylist()
    with pytest.raises(UsageError, match="no such directory"):
        report(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="neither a run"):
        report(tmp_path)
    with pytest.raises(UsageError, match=r"eval\.json: there is no such file; ple eval"):
        report(run, evals=(tmp_path,))
    with pytest.raises(DamagedError, match=r"cases\.parquet: the file is missing"):
        report(run, cases=tmp_path)
    save_rows(tmp_path / "cases.parquet", "cases", [case], {"reward_models": ["r"]})
    with pytest.raises(DamagedError, match=r"cases\.parquet: 2 rewards of 1 reward models"):
        report(run, cases=tmp_path)
    (tmp_path / "judge.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"judge\.json: not a readable JudgeReport"):
        report(run, judges=(tmp_path,))
    other = make_run(tmp_path / "run", [plain_rows(2)])
    (other / "stages.json").write_text('{"stages": [7]}')
    with pytest.raises(DamagedError, match=r"stages\.json: not a record of stages"):
        report(other)
    (other / "stages.json").unlink()
    (other / "metrics" / "round=000.parquet").write_bytes(b"no table")
    with pytest.raises(DamagedError, match=r"round=000\.parquet: not a readable table"):
        report(other)


def test_sides_of_a_comparison_stay_apart_however_long_their_paths():
    assert side("runs/paper/imdb/eval/seed=0/eval.parquet#label=ple") == "ple"
    one, other = (side(f"/a/very/long/path/to/some/folder/of/answers/{name}.jsonl") for name in ("one", "other"))
    assert one != other
    assert one.endswith("/one.jsonl")
    assert one.startswith("...")


def test_win_rates_say_how_each_kind_of_judge_decides():
    counts = {"a": "x.jsonl", "b": "y.jsonl", "wins": 3, "ties": 1, "losses": 2, "win_rate": None}
    counts |= {"prompt_tokens": 0, "completion_tokens": 0}
    judges = {"people": "By people", "reward:r@0": "By a reward model", "openai:m": "asked in both orders"}
    found = [("d", JudgeReport(judge=judge, unparsed=n, **counts)) for n, judge in enumerate(judges)]
    for one, (judge, words) in zip(found, judges.items(), strict=True):
        [chart] = judged([one]).charts
        assert words in chart.caption
        assert ("both orders" in chart.caption) == (judge == "openai:m")
        assert f"by {judge}" in chart.svg
        assert (f"unparsed {one[1].unparsed}" in chart.svg) == (judge != "people")
    assert all(words in judged(found).charts[0].caption for words in judges.values())


def test_differences_are_a_row_a_policy_and_huge_values_are_short(tmp_path):
    estimate = {"mean": 2.5e12, "low": 1e12, "high": 4e12, "count": 8}
    policies = [f"stabilised-without-weighted-sft-{n}" for n in (1, 2)]
    found = EvalReport.model_validate(
        {
            "queries": "q",
            "seed": 0,
            "reward_models": [],
            "bleu_signature": None,
            "policies": [
                {"label": name, "policy": name, "metrics": {"perplexity": estimate, "length": estimate}}
                for name in ("base", *policies)
            ],
            "comparisons": [
                {"label": name, "baseline": "base", "metric": metric, "difference": estimate}
                for name in policies
                for metric in ("perplexity", "length")
            ],
        }
    )
    [values, differences] = evaluations([("eval", found)], {}).tables
    assert [row[0] for row in values.rows] == ["base", *policies]
    assert differences.head == ["policy", "perplexity", "length"]
    assert differences.rows == [[name, *["2.50e+12 [1.00e+12, 4.00e+12]"] * 2] for name in policies]


def test_rewards_are_drawn_against_kl_where_both_were_measured():
    """A panel a reward model, a point a policy that has both, at its means and with its intervals."""

    def estimate(mean: float) -> dict:
        return {"mean": mean, "low": mean - 0.5, "high": mean + 0.25, "count": 4}

    measured = {
        "start": {"kl": estimate(0), "reward:a": estimate(1)},
        "ple": {"kl": estimate(7), "reward:a": estimate(2), "reward:b": estimate(3)},
        "other": {"reward:a": estimate(4)},
    }
    found = EvalReport(
        queries="q", seed=0, reward_models=[], bleu_signature=None, comparisons=[], left_out=["No KL: <why>"],
        policies=[{"label": name, "policy": name, "metrics": metrics} for name, metrics in measured.items()],
    )  # fmt: skip
    far = [(policy.label, policy.metrics) for policy in found.policies if "kl" in policy.metrics]
    with svg.style():
        figure = figures.rewards_by_kl(far, {"reward:a": "R1", "reward:b": "R2"})
        models = {f"reward:{name}": RewardModel(f"R{name}", f"R{name}", name) for name in "ab"}
        section = evaluations([("eval", found)], {name.removeprefix("reward:"): use for name, use in models.items()})
    points = [[tuple(float(v[0]) for v in c.lines[0].get_data()) for c in axes.containers] for axes in figure.axes]
    assert points == [[(0, 1), (7, 2)], [(7, 3)]]
    across, up = (bars.get_segments()[0].tolist() for bars in figure.axes[1].containers[0].lines[2])
    assert (across, up) == ([[6.5, 3], [7.25, 3]], [[7, 2.5], [7, 3.25]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["start", "ple"]
    assert [chart.name for chart in section.charts] == ["rewards-by-kl-1"]
    assert section.missing == ["eval: No KL: <why>."]


def test_every_colour_of_the_style_is_one_of_the_palette():
    look = (Path(svg.__file__).parent / "assets" / "report.mplstyle").read_text()
    assert {f"#{colour}" for colour in re.findall(r"color: ([0-9a-f]{6})\n", look)} <= set(svg.PALETTE.values())
