"""`ple report`: one self-contained HTML page about a run, and its figures as PNG files.

`sources` reads what there is, `round_tables` counts over the pairs, `figures` draws, `sections` says what goes where,
`page` writes. Model text is data in all of them: it is shown as text, by templates that escape, and nothing is loaded.
"""

from ple_data.common.extras import need

need("matplotlib", "`ple report` draws with")
