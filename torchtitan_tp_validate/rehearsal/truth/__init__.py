"""The truth suite: lists of cases, and what our verdicts on them are worth."""
