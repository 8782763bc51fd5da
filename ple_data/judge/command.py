"""`ple judge`: which judge it is, and what of the options it heeds."""

from ple_data.common.click_options import refuse_given
from ple_data.judge import judge, people
from schemas.errors import UsageError
from schemas.options import Judge


def run(options: Judge) -> str:
    """Judge by a model, write a page for people, or read what they chose → the text to print. Raises UsageError."""
    if options.human == (options.spec is not None):
        raise UsageError("give either --judge SPEC or --human")
    if options.spec is not None:
        refuse_given(["People"], "without --human")
        if options.spec.startswith("reward:"):
            refuse_given(["Language model"], "by a reward model")
        else:
            refuse_given(["Reward model"], "by a language model")
        return judge.judge(options)
    refuse_given(["Language model", "Reward model"], "with --human")
    a, b, output = options.a, options.b, options.output
    if options.exports:
        refuse_given([], "with --read, which goes by what the page was made with", "limit", "seed", "label_studio")
        return people.read_exports(a, b, options.exports, output)
    how = options.limit, options.seed, options.label_studio
    return people.write_page(a, b, output, limit=how[0], seed=how[1], label_studio=how[2])
