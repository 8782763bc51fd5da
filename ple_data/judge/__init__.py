"""`ple judge`: which of two responses to the same query is better, by a language model, a reward model or people.

Reads responses and never samples any. Model text is data: it can end no prompt template and run in no page.
"""
