"""Every file that one process hands to another: table schemas, records, the recipe, and how files are put on disk."""
