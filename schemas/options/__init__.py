"""Every option of every command, stated once: its default, bounds, help, heading, and whether it is machine-only.

A group is a small frozen dataclass; a command is a dataclass of the groups that it takes. The command line
(`ple_data.common.click_options`), the recipe (`schemas.recipe`), the tables of the docs and what an output remembers
(`ple_data.common.settings`) are made from here. Nothing is read or computed here, and nothing heavy is imported.
"""

from schemas.options.combination import *
from schemas.options.commands import *
from schemas.options.form import *
from schemas.options.groups import *
from schemas.options.objectives import *
