"""Rows for `ple sft` from HH: x = the dialogue up to the last Assistant turn, y = the chosen answer.

python examples/hh_sft.py Anthropic/hh-rlhf > hh-sft.jsonl      (or a file with a column `chosen`)
"""

import json
import sys

from ple_data.inputs.queries import load_queries
from schemas.options import Reading

for query in load_queries(sys.argv[1], Reading(reader="hh"), chat=True).queries:
    if query.reference:
        print(json.dumps({"x": query.x, "y": query.reference}, ensure_ascii=False))
