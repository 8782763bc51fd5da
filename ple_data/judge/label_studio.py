"""The same blind comparisons as tasks for Label Studio, with the configuration of its labelling page.

Its Pairwise tag chooses a side and knows no tie, so a choice for ties stands beside it. The names `prompt`, `answer1`
and `answer2` are those of Label Studio's template for human preferences
(https://labelstud.io/templates/generative-pairwise-human-preference).
"""

import json
from collections.abc import Sequence

from ple_data.judge.page import Item, page_digest

CONFIG = """<View>
  <Header value="Which response is better? Click it, or choose tie."/>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="comparison" toName="answer1,answer2"/>
  <View style="display: grid; grid-template-columns: 1fr 1fr; column-gap: 1em">
    <Text name="answer1" value="$answer1"/>
    <Text name="answer2" value="$answer2"/>
  </View>
  <Choices name="tie" toName="prompt" choice="single">
    <Choice value="tie"/>
  </Choices>
</View>
"""


def tasks(items: Sequence[Item]) -> str:
    """The tasks as a JSON list; `page` and `query_id` say later to which comparison an answer belongs."""
    page = page_digest(items)
    rows = []
    for item in items:
        shown = item.shown()
        texts = {"prompt": shown["x"], "answer1": shown["first"], "answer2": shown["second"]}
        rows.append({"data": {**texts, "query_id": shown["id"], "page": page}})
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
